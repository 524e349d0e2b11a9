#ifndef STRAIT_H
#define STRAIT_H

/* Generated from clients/c/src by `cargo xtask header`: do not edit. */

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

/*
 * strait: tensors in shared memory, and sandboxed kernels by name.
 *
 * Errors. A function that may fail returns a strait_error, or NULL. The caller frees it (strait_error_free). What a failed
 * function would have returned through its pointers is then NULL, or zero.
 *
 * Handles (strait_client, strait_segment, strait_call, strait_result, strait_prepared, strait_stream, strait_operation, strait_error) are opaque,
 * and each is freed by the function of its name, in any order: a handle keeps what it needs of another. NULL is fine for
 * every one of these functions; freeing a handle twice, or using it after it was freed, is not. strait_finish... frees its operation.
 *
 * Threads. Any functions may be called at once, with the same handles or others, except freeing one that is in use. Calls on one
 * strait_prepared or strait_stream wait for each other.
 *
 * Pointers that a program passes are NULL or point to what their type says, and are needed only until the function returns, unless
 * its description says more. Texts are UTF-8 and end with 0. What a `const char *` or a strait_tensor that a program gets points to
 * belongs to the handle, and stays until that is freed, unless the description says less; a `char *` is freed by strait_text_free.
 *
 * Waiting. Functions without _start wait on the calling thread. Those with it return at once; a strait_operation then has a descriptor that can be
 * waited for with others (poll, epoll, the event loop of a language):
 *
 *     e = strait_call_start(call, &operation);
 *     while (!strait_operation_poll(operation)) { ... wait until strait_operation_fd(operation) is readable ... }
 *     e = strait_finish_result(operation, &result);
 *
 * Forks. A child must make its own connection: handles of its parent fail there with kind STRAIT_ERROR_KIND_FORKED, and their memory is not there.
 */

#if defined(__GNUC__)
#define STRAIT_MUST_USE __attribute__((warn_unused_result))
#else
#define STRAIT_MUST_USE
#endif

/* Whether the library that was loaded matches this header. Programs that load it by hand (dlopen) ask before anything else; for others the
 * loader has checked (libstrait.so.N). */
#define STRAIT_ABI_MATCHES() (strait_abi_version() == STRAIT_ABI_VERSION)

/**
 * The version of this interface. It changes when programs compiled with the previous strait.h would no longer work.
 */
#define STRAIT_ABI_VERSION 1

/**
 * The most axes that a tensor can have.
 */
#define STRAIT_DIMS_MAX 8

/**
 * For strait_options.flags: leases are not renewed in the background, and end when they expire.
 */
#define STRAIT_NO_RENEWAL 1

/**
 * What a program can do about an error. Numbers are never reused for another kind; a newer library may have more.
 */
typedef enum strait_error_kind {
  /**
   * The host refused, or the kernel failed: code, reason, request_id, backtrace and details are the host's own.
   */
  STRAIT_ERROR_KIND_REMOTE = 1,
  /**
   * A lease is over and the connection is fine: map it again.
   */
  STRAIT_ERROR_KIND_LEASE_EXPIRED = 2,
  /**
   * The connection is over. What is mapped stays readable, everything else needs a new one.
   */
  STRAIT_ERROR_KIND_DISCONNECTED = 3,
  /**
   * No host to connect to.
   */
  STRAIT_ERROR_KIND_NO_HOST = 4,
  /**
   * An argument that can never work; nothing was sent.
   */
  STRAIT_ERROR_KIND_ARGUMENT = 5,
  /**
   * It would work at another time: an operation under way uses the handle, or the handle is over.
   */
  STRAIT_ERROR_KIND_STATE = 6,
  /**
   * The client was connected before a fork, and this is the child.
   */
  STRAIT_ERROR_KIND_FORKED = 7,
  /**
   * What this library does not do yet.
   */
  STRAIT_ERROR_KIND_UNSUPPORTED = 8,
  /**
   * The host said something that the protocol does not allow.
   */
  STRAIT_ERROR_KIND_PROTOCOL = 9,
  /**
   * Linux refused memory, a descriptor or a thread.
   */
  STRAIT_ERROR_KIND_LINUX = 10,
  /**
   * A bug in this library (reason HOST, as for a bug in the host).
   */
  STRAIT_ERROR_KIND_BUG = 11,
} strait_error_kind;

/**
 * The type of a tensor's elements, by numpy's and ml_dtypes' names. Always little-endian. Numbers never change.
 */
typedef enum strait_dtype {
  /**
   * One byte: 0 is false, any other true.
   */
  STRAIT_DTYPE_BOOL8 = 1,
  /**
   * Signed, 8 bits.
   */
  STRAIT_DTYPE_INT8 = 2,
  /**
   * Signed, 16 bits.
   */
  STRAIT_DTYPE_INT16 = 3,
  /**
   * Signed, 32 bits.
   */
  STRAIT_DTYPE_INT32 = 4,
  /**
   * Signed, 64 bits.
   */
  STRAIT_DTYPE_INT64 = 5,
  /**
   * Unsigned, 8 bits.
   */
  STRAIT_DTYPE_UINT8 = 6,
  /**
   * Unsigned, 16 bits.
   */
  STRAIT_DTYPE_UINT16 = 7,
  /**
   * Unsigned, 32 bits.
   */
  STRAIT_DTYPE_UINT32 = 8,
  /**
   * Unsigned, 64 bits.
   */
  STRAIT_DTYPE_UINT64 = 9,
  /**
   * IEEE 754 binary16.
   */
  STRAIT_DTYPE_FLOAT16 = 10,
  /**
   * The upper half of a binary32.
   */
  STRAIT_DTYPE_BFLOAT16 = 11,
  /**
   * OCP 8-bit float, 4 exponent and 3 mantissa bits, finite values and NaN only.
   */
  STRAIT_DTYPE_FLOAT8_E4M3FN = 12,
  /**
   * OCP 8-bit float, 5 exponent and 2 mantissa bits, with infinities.
   */
  STRAIT_DTYPE_FLOAT8_E5M2 = 13,
  /**
   * IEEE 754 binary32.
   */
  STRAIT_DTYPE_FLOAT32 = 14,
  /**
   * IEEE 754 binary64.
   */
  STRAIT_DTYPE_FLOAT64 = 15,
  /**
   * A pair of float32: real, imaginary.
   */
  STRAIT_DTYPE_COMPLEX64 = 16,
  /**
   * A pair of float64: real, imaginary.
   */
  STRAIT_DTYPE_COMPLEX128 = 17,
} strait_dtype;

/**
 * What a kernel returned.
 */
typedef struct strait_result strait_result;

/**
 * What to call a kernel with. It can be sent any number of times, even at once, and be changed in between.
 */
typedef struct strait_call strait_call;

/**
 * A connection to a host.
 */
typedef struct strait_client strait_client;

/**
 * An error. Whoever gets one frees it with strait_error_free.
 */
typedef struct strait_error strait_error;

/**
 * Something that was started, by one of the functions that end with _start.
 *
 * It makes progress in strait_operation_poll and strait_finish..., on the thread that calls them and nowhere else: copies and system calls of this process
 * are made there. Its first request is sent when it is started.
 */
typedef struct strait_operation strait_operation;

/**
 * A kernel that is ready to be called again and again on small tensors. It has a socket of its own.
 */
typedef struct strait_prepared strait_prepared;

/**
 * Memory with one or more tensors: one to be filled (strait_create), a flight (strait_map), or a result (strait_result_take). A
 * small result is memory of this process alone, and is used in the same way.
 *
 * What its tensors point to stays until strait_segment_free.
 */
typedef struct strait_segment strait_segment;

/**
 * A kernel that is ready for tensors that come in chunks of rows. It has a socket of its own.
 */
typedef struct strait_stream strait_stream;

/**
 * How a client behaves. Set all of it to zero first, which is the default.
 */
typedef struct strait_options {
  /**
   * Lifetime of leases in milliseconds; 0: the host's default. Never more than its maximum.
   */
  uint64_t lease_ms;
  /**
   * Name and version by which the host's log knows this client; NULL: strait-c/VERSION.
   */
  const char *name;
  /**
   * STRAIT_NO_RENEWAL, or 0.
   */
  uint32_t flags;
  /**
   * 0.
   */
  uint32_t reserved[7];
} strait_options;

/**
 * An array: what it is, and where its elements are, row-major (the last axis varies fastest) and contiguous.
 *
 * A program fills one in to say what it has (with `data`) or wants (a spec: `data` is NULL); set all of it to zero first. One that a
 * function fills in points to memory of that function's handle, which the program may only read.
 */
typedef struct strait_tensor {
  /**
   * Its name in a segment, or the port of a result. May be NULL if the name is given in another way.
   */
  const char *name;
  /**
   * One of strait_dtype.
   */
  uint32_t dtype;
  /**
   * Number of axes: how many entries of `shape` are used. 0: one element.
   */
  uint32_t ndim;
  /**
   * The sizes of its axes.
   */
  uint64_t shape[STRAIT_DIMS_MAX];
  /**
   * The elements.
   */
  const void *data;
  /**
   * Bytes at `data`: exactly the number of elements times the size of one. In a spec: 0, or the same.
   */
  uint64_t bytes;
} strait_tensor;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The STRAIT_ABI_VERSION of the library that was loaded, to be compared with that of the header: STRAIT_ABI_MATCHES().
 */
uint32_t strait_abi_version(void);

/**
 * The library's own version, such as "0.1.0".
 */
const char *strait_version(void);

/**
 * What can be done about it: one of strait_error_kind. 0 for NULL.
 */
uint32_t strait_error_get_kind(const struct strait_error *error);

/**
 * The name of a gRPC code, the class of the error: "NOT_FOUND". NULL for NULL, like the other texts.
 */
const char *strait_error_code(const struct strait_error *error);

/**
 * The stable word for the case, for programs: "FLIGHT_NOT_FOUND". docs/protocol.md has the host's; this library's own are
 * BAD_ARGUMENT, BAD_ADDRESS, REMOTE_ADDRESS, NO_HOST, DISCONNECTED, WRONG_STATE, FORKED, BROKEN_PROTOCOL, LINUX, HOST.
 */
const char *strait_error_reason(const struct strait_error *error);

/**
 * For people: what, which, by how much, what to do.
 */
const char *strait_error_message(const struct strait_error *error);

/**
 * The id by which the host's log knows the request; NULL if the host was not asked.
 */
const char *strait_error_request_id(const struct strait_error *error);

/**
 * The guest's stack when it trapped; NULL if there is none.
 */
const char *strait_error_backtrace(const struct strait_error *error);

/**
 * Figures and names, a JSON object as in docs/protocol.md; NULL if there are none.
 */
const char *strait_error_details(const struct strait_error *error);

/**
 * Frees an error, and the texts that came from it. NULL is fine.
 */
void strait_error_free(struct strait_error *error);

/**
 * The name of one of strait_dtype, such as "float64"; NULL for other numbers.
 */
const char *strait_dtype_name(uint32_t dtype);

/**
 * The strait_dtype of that name; 0 if there is none, or `name` is NULL.
 */
uint32_t strait_dtype_named(const char *name);

/**
 * Connects to the host at `address` ("unix:///DIRECTORY"). NULL: the one that STRAIT_ADDRESS names, or the first one found in the usual places
 * (docs/protocol.md). Addresses of other machines are refused for now (REMOTE_ADDRESS). `options` may be NULL.
 */
STRAIT_MUST_USE
struct strait_error *strait_connect(const char *address,
                                    const struct strait_options *options,
                                    struct strait_client **client);

/**
 * Starts a strait_connect; strait_finish_client ends it.
 */
STRAIT_MUST_USE
struct strait_error *strait_connect_start(const char *address,
                                          const struct strait_options *options,
                                          struct strait_operation **operation);

/**
 * The same connection, with this id in each of its requests, and so in the host's log and in errors: 1 to 64 characters from
 * A-Z a-z 0-9 . _ : -
 */
STRAIT_MUST_USE
struct strait_error *strait_client_with_request_id(const struct strait_client *client,
                                                   const char *request_id,
                                                   struct strait_client **with_id);

/**
 * Ends the connection now, for everything that uses it. What is mapped stays readable.
 */
void strait_client_close(const struct strait_client *client);

/**
 * Frees a client. The connection ends with the last of its clients, segments and operations. NULL is fine.
 */
void strait_client_free(struct strait_client *client);

/**
 * The host's id; NULL for NULL.
 */
const char *strait_client_host_id(const struct strait_client *client);

/**
 * Bytes from which on a tensor reaches a kernel without a copy; 0 for NULL.
 */
uint64_t strait_client_move_min_bytes(const struct strait_client *client);

/**
 * Bytes up to which a tensor travels in a call's request and reply; 0 for NULL.
 */
uint64_t strait_client_inline_bytes(const struct strait_client *client);

/**
 * Tensor bytes that this library copied for this connection; 0 for NULL.
 */
uint64_t strait_client_copied_bytes(const struct strait_client *client);

/**
 * Removes the name of a flight. Its memory is freed when nobody uses it any more.
 */
STRAIT_MUST_USE struct strait_error *strait_drop(const struct strait_client *client, const char *name);

/**
 * Starts a strait_drop; strait_finish ends it.
 */
STRAIT_MUST_USE
struct strait_error *strait_drop_start(const struct strait_client *client,
                                       const char *name,
                                       struct strait_operation **operation);

/**
 * The caller's flights, by name: {"flights": [{"name", "mapping"}, ...]}, as in LIST of docs/protocol.md. strait_text_free
 * frees the text.
 */
STRAIT_MUST_USE
struct strait_error *strait_list(const struct strait_client *client,
                                 char **text);

/**
 * Starts a strait_list; strait_finish_text ends it.
 */
STRAIT_MUST_USE
struct strait_error *strait_list_start(const struct strait_client *client,
                                       struct strait_operation **operation);

/**
 * The kernels, by plugin and name, all of them or those called `kernel`: {"kernels": [{"name", "plugin", "inputs", "outputs",
 * "parameters", ...}, ...]}, as in KERNELS of docs/protocol.md. strait_text_free frees the text.
 */
STRAIT_MUST_USE
struct strait_error *strait_kernels(const struct strait_client *client,
                                    const char *kernel,
                                    char **text);

/**
 * Starts a strait_kernels; strait_finish_text ends it.
 */
STRAIT_MUST_USE
struct strait_error *strait_kernels_start(const struct strait_client *client,
                                          const char *kernel,
                                          struct strait_operation **operation);

/**
 * The host's counts, as in STATS of docs/protocol.md. strait_text_free frees the text.
 */
STRAIT_MUST_USE struct strait_error *strait_stats(const struct strait_client *client, char **text);

/**
 * Starts a strait_stats; strait_finish_text ends it.
 */
STRAIT_MUST_USE
struct strait_error *strait_stats_start(const struct strait_client *client,
                                        struct strait_operation **operation);

/**
 * Frees a text that a function returned. NULL is fine.
 */
void strait_text_free(char *text);

/**
 * Makes a segment with room for `count` tensors, to be filled in place (strait_segment_fill): it then goes to a kernel or under a name without
 * a copy. `tensors` are specs with names; all have the same size of the first axis. The elements are zero.
 */
STRAIT_MUST_USE
struct strait_error *strait_create(const struct strait_client *client,
                                   const struct strait_tensor *tensors,
                                   size_t count,
                                   struct strait_segment **segment);

/**
 * Starts a strait_create; strait_finish_segment ends it.
 */
STRAIT_MUST_USE
struct strait_error *strait_create_start(const struct strait_client *client,
                                         const struct strait_tensor *tensors,
                                         size_t count,
                                         struct strait_operation **operation);

/**
 * Where the elements of the tensor `name` (NULL: the first) of a strait_create are to be written, and how many bytes there are. The address stays
 * the same until strait_segment_free; nobody may write there while a call that uses the segment is under way (then this is refused, too),
 * and after strait_segment_publish nobody can.
 */
STRAIT_MUST_USE
struct strait_error *strait_segment_fill(const struct strait_segment *segment,
                                         const char *name,
                                         void **data,
                                         uint64_t *bytes);

/**
 * Gives a segment a name: others find it by that, and it lives on without this program. One to be filled is sealed first, by which
 * its memory becomes read-only at the same address. A name that is taken is refused unless `replace`.
 */
STRAIT_MUST_USE
struct strait_error *strait_segment_publish(const struct strait_segment *segment,
                                            const char *name,
                                            bool replace);

/**
 * Starts a strait_segment_publish; strait_finish ends it.
 */
STRAIT_MUST_USE
struct strait_error *strait_segment_publish_start(const struct strait_segment *segment,
                                                  const char *name,
                                                  bool replace,
                                                  struct strait_operation **operation);

/**
 * Copies a tensor of the program's memory into a segment and gives that a name. strait_create saves the copy.
 */
STRAIT_MUST_USE
struct strait_error *strait_put(const struct strait_client *client,
                                const char *name,
                                const struct strait_tensor *tensor,
                                bool replace);

/**
 * Starts a strait_put; strait_finish ends it. The elements must stay, and not be written to, until then.
 */
STRAIT_MUST_USE
struct strait_error *strait_put_start(const struct strait_client *client,
                                      const char *name,
                                      const struct strait_tensor *tensor,
                                      bool replace,
                                      struct strait_operation **operation);

/**
 * Maps the flight of that name, read-only.
 */
STRAIT_MUST_USE
struct strait_error *strait_map(const struct strait_client *client,
                                const char *name,
                                struct strait_segment **segment);

/**
 * Starts a strait_map; strait_finish_segment ends it.
 */
STRAIT_MUST_USE
struct strait_error *strait_map_start(const struct strait_client *client,
                                      const char *name,
                                      struct strait_operation **operation);

/**
 * How many tensors there are; 0 for NULL.
 */
size_t strait_segment_count(const struct strait_segment *segment);

/**
 * The tensor at `index`, from 0 on.
 */
STRAIT_MUST_USE
struct strait_error *strait_segment_tensor_at(const struct strait_segment *segment,
                                              size_t index,
                                              struct strait_tensor *tensor);

/**
 * The tensor `name`; NULL: the first.
 */
STRAIT_MUST_USE
struct strait_error *strait_segment_tensor(const struct strait_segment *segment,
                                           const char *name,
                                           struct strait_tensor *tensor);

/**
 * Gives the segment's lease a new life of so many milliseconds (0: the host's default) from now on, and says what the host granted. Leases are renewed
 * by themselves but with STRAIT_NO_RENEWAL. `expires_ms` may be NULL.
 */
STRAIT_MUST_USE
struct strait_error *strait_segment_renew(const struct strait_segment *segment,
                                          uint64_t lease_ms,
                                          uint64_t *expires_ms);

/**
 * Unmaps a segment and gives its lease back; one that was made here and has no name is gone then. What its tensors pointed to must not be touched any more.
 * Operations that use it keep what they need. NULL is fine.
 */
void strait_segment_free(struct strait_segment *segment);

/**
 * Begins a call of `kernel`, or "plugin/kernel" if two plugins have one of that name. Nothing is sent yet.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_new(const struct strait_client *client,
                                     const char *kernel,
                                     struct strait_call **call);

/**
 * Gives an input port a flight by name: "x", or "x#tensor" for one of its tensors.
 */
STRAIT_MUST_USE struct strait_error *strait_call_flight(const struct strait_call *call, const char *port, const char *name);

/**
 * Gives an input port a tensor of a segment (NULL: its only one). The segment may be freed before the call is sent.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_segment(const struct strait_call *call,
                                         const char *port,
                                         const struct strait_segment *segment,
                                         const char *tensor);

/**
 * Gives an input port elements in the program's memory, which each run copies: small ones into its request, others into a segment. They must stay, and
 * not be written to while the call is under way, until strait_call_free and the end of every operation that it started.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_tensor(const struct strait_call *call,
                                        const char *port,
                                        const struct strait_tensor *tensor);

/**
 * For strait_prepare and strait_prepare_stream: an input whose elements each call brings, at most as many along each axis as `spec` says; for a stream
 * the first axis is the largest number of rows in a chunk.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_each(const struct strait_call *call,
                                      const char *port,
                                      const struct strait_tensor *spec);

/**
 * Gives a parameter an integer. It reaches the kernel exactly, as do the values of the functions below. An axis is 0-based and row-major.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_param_int(const struct strait_call *call,
                                           const char *name,
                                           int64_t value);

/**
 * Gives a parameter an integer that may be beyond INT64_MAX.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_param_uint(const struct strait_call *call,
                                            const char *name,
                                            uint64_t value);

/**
 * Gives a parameter a real number, including NaN and the infinities.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_param_real(const struct strait_call *call,
                                            const char *name,
                                            double value);

/**
 * Gives a parameter a truth value.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_param_bool(const struct strait_call *call,
                                            const char *name,
                                            bool value);

/**
 * Gives a parameter a text.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_param_text(const struct strait_call *call,
                                            const char *name,
                                            const char *value);

/**
 * Gives a parameter a list of `count` integers.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_param_ints(const struct strait_call *call,
                                            const char *name,
                                            const int64_t *values,
                                            size_t count);

/**
 * Gives a parameter a list of `count` real numbers.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_param_reals(const struct strait_call *call,
                                             const char *name,
                                             const double *values,
                                             size_t count);

/**
 * Gives a parameter a value in JSON, such as a list that mixes integers and real numbers. "nan", "inf" and "-inf" stand for those numbers.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_param_json(const struct strait_call *call,
                                            const char *name,
                                            const char *json);

/**
 * Gives an output a name, under which others find it. With `replace` the call may take its names from other flights.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_publish(const struct strait_call *call,
                                         const char *port,
                                         const char *name,
                                         bool replace);

/**
 * The outputs are sealed permanently, so that not even the host can write to them again.
 */
STRAIT_MUST_USE struct strait_error *strait_call_seal(const struct strait_call *call, bool seal);

/**
 * The host looks up in its own maps which pages the guest saw: "pages" of strait_result_report.
 */
STRAIT_MUST_USE struct strait_error *strait_call_verify(const struct strait_call *call, bool verify);

/**
 * Milliseconds of wall time for a run, from the host's receipt on; 0: the host's default. For a prepared kernel: for each call.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_deadline(const struct strait_call *call,
                                          uint64_t ms);

/**
 * Lifetime of the results' leases in milliseconds; 0: the client's.
 */
STRAIT_MUST_USE struct strait_error *strait_call_lease(const struct strait_call *call, uint64_t ms);

/**
 * Bytes of the largest result that comes in the reply and not in a segment; 0: none does. Without this as many as the host allows.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_inline_bytes(const struct strait_call *call,
                                              uint64_t most);

/**
 * The id of the call in the host's log and in errors: 1 to 64 characters from A-Z a-z 0-9 . _ : -
 */
STRAIT_MUST_USE struct strait_error *strait_call_request_id(const struct strait_call *call, const char *id);

/**
 * A repeat of the same call with the same key within a minute gets the same results without another run.
 */
STRAIT_MUST_USE struct strait_error *strait_call_idempotency_key(const struct strait_call *call, const char *key);

/**
 * Runs the kernel and waits for its results.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_send(const struct strait_call *call,
                                      struct strait_result **result);

/**
 * Starts a strait_call_send; strait_finish_result ends it, strait_operation_free cancels it. The call may be freed before.
 */
STRAIT_MUST_USE
struct strait_error *strait_call_start(const struct strait_call *call,
                                       struct strait_operation **operation);

/**
 * Asks the host to end all runs of the call that are under way, in whatever thread; they fail with CANCELLED. No effect if there is none.
 */
void strait_call_cancel(const struct strait_call *call);

/**
 * Ends a call; operations that it started go on. NULL is fine.
 */
void strait_call_free(struct strait_call *call);

/**
 * How many outputs there are; 0 for NULL.
 */
size_t strait_result_count(const struct strait_result *result);

/**
 * The port of the output at `index`, in the kernel's order; NULL if there is none.
 */
const char *strait_result_port(const struct strait_result *result, size_t index);

/**
 * The output `port`. It points to the pages that the kernel wrote, or to the few bytes that came in the reply, until strait_result_free.
 */
STRAIT_MUST_USE
struct strait_error *strait_result_tensor(const struct strait_result *result,
                                          const char *port,
                                          struct strait_tensor *tensor);

/**
 * Takes the output `port` out of the result, to keep it, to give it a name or to call the next kernel with it. Then what a strait_tensor of it points to
 * stays until strait_segment_free.
 */
STRAIT_MUST_USE
struct strait_error *strait_result_take(const struct strait_result *result,
                                        const char *port,
                                        struct strait_segment **segment);

/**
 * Bytes of the call's tensors that the host copied; 0 for NULL, and for rows of a stream.
 */
uint64_t strait_result_copied_bytes(const struct strait_result *result);

/**
 * The kernel's note under that key; NULL if there is none. "notes" of strait_result_report has all of them.
 */
const char *strait_result_note(const struct strait_result *result, const char *key);

/**
 * The id by which the host's log knows the call; "" for rows of a stream, NULL for NULL.
 */
const char *strait_result_request_id(const struct strait_result *result);

/**
 * What else the host reported, a JSON object: "notes", "seconds", "pages", "minor_faults" and so on, as in INVOKE of docs/protocol.md.
 * strait_text_free frees the text.
 */
STRAIT_MUST_USE
struct strait_error *strait_result_report(const struct strait_result *result,
                                          char **text);

/**
 * Ends a result, and the outputs that were not taken out. NULL is fine.
 */
void strait_result_free(struct strait_result *result);

/**
 * Makes a kernel ready to be called again and again: `call` says which, with what parameters, which inputs each call brings (strait_call_each), and
 * which are the same for all. The inputs that calls bring and the outputs have at most 131072 bytes together, each way.
 */
STRAIT_MUST_USE
struct strait_error *strait_prepare(const struct strait_call *call,
                                    struct strait_prepared **prepared);

/**
 * Starts a strait_prepare; strait_finish_prepared ends it.
 */
STRAIT_MUST_USE
struct strait_error *strait_prepare_start(const struct strait_call *call,
                                          struct strait_operation **operation);

/**
 * How many inputs each call brings; 0 for NULL.
 */
size_t strait_prepared_inputs(const struct strait_prepared *prepared);

/**
 * Port and spec, at its largest, of the input at `index`, in the order in which calls bring them.
 */
STRAIT_MUST_USE
struct strait_error *strait_prepared_input(const struct strait_prepared *prepared,
                                           size_t index,
                                           struct strait_tensor *spec);

/**
 * How many outputs the kernel has; 0 for NULL.
 */
size_t strait_prepared_outputs(const struct strait_prepared *prepared);

/**
 * Port and spec, at its largest, of the output at `index`, in the kernel's order.
 */
STRAIT_MUST_USE
struct strait_error *strait_prepared_output(const struct strait_prepared *prepared,
                                            size_t index,
                                            struct strait_tensor *spec);

/**
 * Runs the kernel on `inputs`, in the order of strait_prepared_input, and waits for its results: `outputs`, which must have room for at least as many
 * tensors as there are outputs, shows them until the next call of the same handle. Calls from several threads wait for each other, and overwrite each
 * other's outputs: threads that call at once should each prepare their own. A kernel that fails does not affect later calls.
 */
STRAIT_MUST_USE
struct strait_error *strait_prepared_call(const struct strait_prepared *prepared,
                                          const struct strait_tensor *inputs,
                                          size_t input_count,
                                          struct strait_tensor *outputs,
                                          size_t output_count);

/**
 * Starts a strait_prepared_call; strait_finish_outputs ends it. The inputs have been sent when this returns.
 */
STRAIT_MUST_USE
struct strait_error *strait_prepared_call_start(const struct strait_prepared *prepared,
                                                const struct strait_tensor *inputs,
                                                size_t input_count,
                                                struct strait_operation **operation);

/**
 * The kernel's note under that key in the last call, valid until the next call; NULL if there is none.
 */
const char *strait_prepared_note(const struct strait_prepared *prepared, const char *key);

/**
 * What else the host told of the last call, a JSON object: "notes", all of them, as INVOKE of docs/protocol.md has them. strait_text_free frees the text.
 */
STRAIT_MUST_USE
struct strait_error *strait_prepared_report(const struct strait_prepared *prepared,
                                            char **text);

/**
 * Asks the host to end the call that is under way, which then fails with CANCELLED. `cancelled` (may be NULL) says whether there was one that the host
 * had begun: if not, ask again until the call is answered, and do not call again before this has returned.
 */
STRAIT_MUST_USE
struct strait_error *strait_prepared_cancel(const struct strait_prepared *prepared,
                                            bool *cancelled);

/**
 * Ends a prepared kernel, in the host too, and frees the outputs of its last call. NULL is fine.
 */
void strait_prepared_free(struct strait_prepared *prepared);

/**
 * Makes a kernel that streams ready for a tensor in chunks of rows, as strait_prepare does for calls. The kernel keeps its state from the first chunk to the last,
 * and all its output rows are bit for bit those of one call on all rows.
 */
STRAIT_MUST_USE
struct strait_error *strait_prepare_stream(const struct strait_call *call,
                                           struct strait_stream **stream);

/**
 * Starts a strait_prepare_stream; strait_finish_stream ends it.
 */
STRAIT_MUST_USE
struct strait_error *strait_prepare_stream_start(const struct strait_call *call,
                                                 struct strait_operation **operation);

/**
 * How many inputs come in chunks; 0 for NULL.
 */
size_t strait_stream_inputs(const struct strait_stream *stream);

/**
 * Port and spec of the input at `index`; the first size is the largest number of rows in a chunk.
 */
STRAIT_MUST_USE
struct strait_error *strait_stream_input(const struct strait_stream *stream,
                                         size_t index,
                                         struct strait_tensor *spec);

/**
 * Sends the next rows of each input, in the order of strait_stream_input, perhaps none, and waits for the output, perhaps no rows either. With
 * `last` they are the last ones: the rest of the output comes, with the kernel's notes, and the next chunk begins another stream. A kernel that fails ends
 * the stream (strait_error_details has the number of the chunk), and so does an operation that is abandoned.
 */
STRAIT_MUST_USE
struct strait_error *strait_stream_chunk(const struct strait_stream *stream,
                                         const struct strait_tensor *inputs,
                                         size_t count,
                                         bool last,
                                         struct strait_result **result);

/**
 * Starts a strait_stream_chunk; strait_finish_result ends it. The rows have been sent when this returns.
 */
STRAIT_MUST_USE
struct strait_error *strait_stream_chunk_start(const struct strait_stream *stream,
                                               const struct strait_tensor *inputs,
                                               size_t count,
                                               bool last,
                                               struct strait_operation **operation);

/**
 * Ends a stream, in the host too. NULL is fine.
 */
void strait_stream_free(struct strait_stream *stream);

/**
 * A descriptor that becomes readable when there is something to do: then call strait_operation_poll. It stays readable when the operation is done. It belongs
 * to the operation: do not read from it or close it, and ask again after each strait_operation_poll. -1 for NULL.
 */
int32_t strait_operation_fd(const struct strait_operation *operation);

/**
 * Does what can be done without waiting. True once the operation is done, so that strait_finish... returns at once; true for NULL.
 */
bool strait_operation_poll(const struct strait_operation *operation);

/**
 * Abandons an operation: a kernel that it runs is cancelled, its result is released. A prepared call or a stream
 * whose operation is abandoned before it is done is over; one that the host has not begun then runs to its deadline. NULL is fine.
 */
void strait_operation_free(struct strait_operation *operation);

/**
 * Ends an operation that has no result: waits for it if it is not done, and frees it, as do all the functions below, whatever they return.
 */
STRAIT_MUST_USE
struct strait_error *strait_finish(struct strait_operation *operation);

/**
 * Ends a strait_connect_start.
 */
STRAIT_MUST_USE
struct strait_error *strait_finish_client(struct strait_operation *operation,
                                          struct strait_client **client);

/**
 * Ends a strait_create_start or strait_map_start.
 */
STRAIT_MUST_USE
struct strait_error *strait_finish_segment(struct strait_operation *operation,
                                           struct strait_segment **segment);

/**
 * Ends a strait_call_start or strait_stream_chunk_start.
 */
STRAIT_MUST_USE
struct strait_error *strait_finish_result(struct strait_operation *operation,
                                          struct strait_result **result);

/**
 * Ends a strait_prepare_start.
 */
STRAIT_MUST_USE
struct strait_error *strait_finish_prepared(struct strait_operation *operation,
                                            struct strait_prepared **prepared);

/**
 * Ends a strait_prepare_stream_start.
 */
STRAIT_MUST_USE
struct strait_error *strait_finish_stream(struct strait_operation *operation,
                                          struct strait_stream **stream);

/**
 * Ends a strait_prepared_call_start; see strait_prepared_call for `outputs`.
 */
STRAIT_MUST_USE
struct strait_error *strait_finish_outputs(struct strait_operation *operation,
                                           struct strait_tensor *outputs,
                                           size_t count);

/**
 * Ends a strait_list_start, strait_kernels_start or strait_stats_start; strait_text_free frees the text.
 */
STRAIT_MUST_USE struct strait_error *strait_finish_text(struct strait_operation *operation, char **text);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* STRAIT_H */
