/* Every function of strait.h against the host that STRAIT_ADDRESS names: what it does, and that misuse is an error and
 * nothing else. Run as it is, under the sanitizers and under valgrind. */

#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <strait.h>

#define WANT(condition)                                                                            \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static void ok_at(strait_error *error, int line) {
    if (error) {
        fprintf(stderr, "line %d: %s: %s\n", line, strait_error_reason(error), strait_error_message(error));
        exit(1);
    }
}
#define OK(call) ok_at((call), __LINE__)

/* That it fails for that reason, and says that. */
static void fails_at(strait_error *error, const char *reason, const char *says, int line) {
    if (!error || strcmp(strait_error_reason(error), reason) || !strstr(strait_error_message(error), says)) {
        fprintf(stderr, "line %d: wanted %s (%s), got %s: %s\n", line, reason, says,
                error ? strait_error_reason(error) : "no error", error ? strait_error_message(error) : "");
        exit(1);
    }
    WANT(strait_error_get_kind(error) != 0 && strait_error_code(error)[0] != 0);
    strait_error_free(error);
}
#define FAILS(call, reason, says) fails_at((call), (reason), (says), __LINE__)

static strait_tensor tensor(const char *name, uint64_t rows, const double *data) {
    strait_tensor made = {.name = name, .dtype = STRAIT_DTYPE_FLOAT64, .ndim = 1, .shape = {rows}};
    made.data = data;
    made.bytes = data ? rows * sizeof(double) : 0;
    return made;
}

/* Waits for it as an event loop does. */
static strait_operation *waited(strait_operation *operation) {
    while (!strait_operation_poll(operation)) {
        struct pollfd fd = {.fd = strait_operation_fd(operation), .events = POLLIN};
        WANT(fd.fd >= 0 && poll(&fd, 1, 60000) == 1);
    }
    return operation;
}

static strait_call *scale(strait_client *client, double by) {
    strait_call *call;
    OK(strait_call_new(client, "scale-shift", &call));
    OK(strait_call_param_real(call, "a", by));
    return call;
}

static void nothing_is_fine(void) {
    strait_client_free(NULL), strait_segment_free(NULL), strait_call_free(NULL), strait_result_free(NULL);
    strait_prepared_free(NULL), strait_stream_free(NULL), strait_operation_free(NULL), strait_error_free(NULL);
    strait_text_free(NULL), strait_client_close(NULL), strait_call_cancel(NULL);
    WANT(!strait_error_get_kind(NULL) && !strait_error_code(NULL) && !strait_error_message(NULL));
    WANT(!strait_client_host_id(NULL) && !strait_client_inline_bytes(NULL) && !strait_segment_count(NULL));
    WANT(!strait_result_count(NULL) && !strait_result_port(NULL, 0) && !strait_prepared_inputs(NULL));
    WANT(strait_operation_fd(NULL) == -1 && strait_operation_poll(NULL) && !strait_dtype_named(NULL));
    strait_segment *segment = (strait_segment *)1;
    char *text = (char *)1;
    strait_tensor shown;
    FAILS(strait_map(NULL, "x", &segment), "BAD_ARGUMENT", "`client` is NULL");
    WANT(!segment);
    FAILS(strait_list(NULL, &text), "BAD_ARGUMENT", "`client`");
    WANT(!text);
    FAILS(strait_connect(NULL, NULL, NULL), "BAD_ARGUMENT", "`client` is NULL");
    FAILS(strait_segment_tensor(NULL, NULL, &shown), "BAD_ARGUMENT", "`segment`");
    FAILS(strait_call_param_int(NULL, "a", 1), "BAD_ARGUMENT", "`call`");
    FAILS(strait_finish(NULL), "BAD_ARGUMENT", "`operation`");
    FAILS(strait_prepared_call(NULL, NULL, 0, NULL, 0), "BAD_ARGUMENT", "`prepared`");
    FAILS(strait_stream_chunk(NULL, NULL, 0, true, NULL), "BAD_ARGUMENT", "`result`");
}

static void addresses(void) {
    strait_client *client = (strait_client *)1;
    FAILS(strait_connect("grpc+tls://host:8815", NULL, &client), "REMOTE_ADDRESS", "same machine");
    WANT(!client);
    FAILS(strait_connect("nonsense", NULL, &client), "BAD_ADDRESS", "unix:///DIRECTORY");
    FAILS(strait_connect("unix:///nowhere", NULL, &client), "NO_HOST", "strait serve");
    FAILS(strait_connect("unix:///\xff", NULL, &client), "BAD_ARGUMENT", "not UTF-8 from byte 8");
    strait_options options = {.flags = 2};
    FAILS(strait_connect(NULL, &options, &client), "BAD_ARGUMENT", "flags");
}

static void tensors_that_are_wrong(strait_client *client) {
    double data[4] = {1, 2, 3, 4};
    strait_tensor t = tensor("x", 4, data);
    t.bytes = 24;
    FAILS(strait_put(client, "wrong", &t, false), "BAD_ARGUMENT", "has 32 bytes; 24 were given");
    t = tensor("x", 4, data), t.dtype = 99;
    FAILS(strait_put(client, "wrong", &t, false), "BAD_ARGUMENT", "99 is none of strait_dtype");
    t = tensor("x", 4, data), t.ndim = 9;
    FAILS(strait_put(client, "wrong", &t, false), "BAD_ARGUMENT", "9 axes");
    t = tensor("x", 4, data), t.ndim = 2, t.shape[0] = t.shape[1] = UINT64_MAX;
    FAILS(strait_put(client, "wrong", &t, false), "BAD_ARGUMENT", "float64");
    t = tensor("x", 4, data), t.data = NULL;
    FAILS(strait_put(client, "wrong", &t, false), "BAD_ARGUMENT", "data is NULL");
    FAILS(strait_put(client, "a\xc3(", &t, false), "BAD_ARGUMENT", "data is NULL");
    t = tensor("x", 4, data);
    FAILS(strait_put(client, "a\xc3(", &t, false), "BAD_ARGUMENT", "`name` is not UTF-8 from byte 1");
    FAILS(strait_put(client, "a#b", &t, false), "BAD_NAME", "a#b");
    strait_segment *segment;
    FAILS(strait_create(client, &t, 0, &segment), "BAD_ARGUMENT", "at least one");
    FAILS(strait_create(client, NULL, 1, &segment), "BAD_ARGUMENT", "`tensors` is NULL");
    FAILS(strait_create(client, &t, SIZE_MAX / 2, &segment), "BAD_ARGUMENT", "addresses");
    t.name = NULL;
    FAILS(strait_create(client, &t, 1, &segment), "BAD_ARGUMENT", "name of tensor 0");
}

static void flights(strait_client *client) {
    double data[4] = {1, 2, 3, 4};
    strait_tensor t = tensor(NULL, 4, data), shown;
    uint64_t before = strait_client_copied_bytes(client), expires;
    OK(strait_put(client, "c-x", &t, true));
    WANT(strait_client_copied_bytes(client) == before + sizeof data);
    FAILS(strait_put(client, "c-x", &t, false), "NAME_TAKEN", "c-x");
    strait_segment *got, *made;
    OK(strait_map(client, "c-x", &got));
    WANT(strait_segment_count(got) == 1);
    OK(strait_segment_tensor_at(got, 0, &shown));
    WANT(shown.dtype == STRAIT_DTYPE_FLOAT64 && shown.ndim == 1 && shown.shape[0] == 4 && shown.bytes == 32);
    WANT(!strcmp(shown.name, "c-x") && !memcmp(shown.data, data, sizeof data));
    FAILS(strait_segment_tensor(got, "no", &shown), "BAD_ARGUMENT", "it has c-x");
    WANT(!shown.data);
    void *room;
    uint64_t bytes;
    FAILS(strait_segment_fill(got, NULL, &room, &bytes), "WRONG_STATE", "read-only");
    OK(strait_segment_renew(got, 60000, &expires));
    WANT(expires <= 60000 && expires > 0);
    strait_segment_free(got);

    strait_tensor two[2] = {tensor("a", 4, NULL), tensor("b", 4, NULL)};
    OK(strait_create(client, two, 2, &made));
    OK(strait_segment_fill(made, "b", &room, &bytes));
    WANT(bytes == 32);
    memcpy(room, data, bytes);
    before = strait_client_copied_bytes(client);
    OK(strait_segment_publish(made, "c-two", true));
    WANT(strait_client_copied_bytes(client) == before);
    WANT(!memcmp(room, data, bytes));
    FAILS(strait_segment_fill(made, "b", &room, &bytes), "WRONG_STATE", "not writable");
    strait_segment_free(made);
    OK(strait_map(client, "c-two", &got));
    WANT(strait_segment_count(got) == 2);
    OK(strait_segment_tensor(got, "b", &shown));
    WANT(!memcmp(shown.data, data, sizeof data));
    strait_segment_free(got);

    char *text;
    OK(strait_list(client, &text));
    WANT(strstr(text, "\"c-two\""));
    strait_text_free(text);
    OK(strait_kernels(client, "zscore", &text));
    WANT(strstr(text, "\"zscore\"") && !strstr(text, "\"clip\""));
    strait_text_free(text);
    OK(strait_stats(client, &text));
    WANT(strstr(text, "\"segments\""));
    strait_text_free(text);
    OK(strait_drop(client, "c-two"));
    FAILS(strait_drop(client, "c-two"), "FLIGHT_NOT_FOUND", "c-two");
    OK(strait_drop(client, "c-x"));
}

static void calls(strait_client *client) {
    double data[4] = {1, 2, 3, 4};
    strait_tensor t = tensor(NULL, 4, data), y;
    strait_call *call = scale(client, 3);
    strait_result *result;
    OK(strait_call_request_id(call, "c-call-1"));
    OK(strait_call_tensor(call, "x", &t));
    for (int run = 0; run < 2; run++) {
        OK(strait_call_send(call, &result));
        OK(strait_result_tensor(result, "y", &y));
        WANT(y.bytes == 32 && ((const double *)y.data)[3] == 12);
        WANT(strait_result_count(result) == 1 && !strcmp(strait_result_port(result, 0), "y"));
        WANT(!strcmp(strait_result_request_id(result), "c-call-1"));
        char *report;
        OK(strait_result_report(result, &report));
        WANT(strstr(report, "\"seconds\""));
        strait_text_free(report);
        FAILS(strait_result_tensor(result, "z", &y), "BAD_ARGUMENT", "it has y");
        if (run == 0) {
            strait_result_free(result);
        }
    }
    /* A result goes on as it is. */
    strait_segment *taken;
    OK(strait_result_take(result, "y", &taken));
    strait_result_free(result);
    OK(strait_call_segment(call, "x", taken, NULL));
    OK(strait_segment_publish(taken, "c-result", true));
    strait_segment_free(taken);
    OK(strait_call_send(call, &result));
    OK(strait_result_tensor(result, "y", &y));
    WANT(((const double *)y.data)[3] == 36);
    strait_result_free(result);
    OK(strait_call_flight(call, "x", "c-result"));
    OK(strait_call_send(call, &result));
    strait_result_free(result);
    OK(strait_drop(client, "c-result"));
    OK(strait_call_param_json(call, "b", "1.5"));
    FAILS(strait_call_param_json(call, "b", "{"), "BAD_ARGUMENT", "no JSON");
    OK(strait_call_param_int(call, "c", 1));
    OK(strait_call_tensor(call, "x", &t));
    strait_error *error = strait_call_send(call, &result);
    WANT(error && !result && strait_error_get_kind(error) == STRAIT_ERROR_KIND_REMOTE);
    WANT(!strcmp(strait_error_code(error), "INVALID_ARGUMENT") && !strcmp(strait_error_request_id(error), "c-call-1"));
    WANT(strstr(strait_error_details(error), "\"c\"") && !strait_error_backtrace(error));
    FAILS(error, "UNKNOWN_PARAMETER", "no parameter `c`");
    OK(strait_call_each(call, "x", &t));
    FAILS(strait_call_send(call, &result), "BAD_ARGUMENT", "strait_prepare");
    strait_call_free(call);
}

static void settings(strait_client *client) {
    double data[4] = {1, NAN, 3, 4};
    strait_tensor t = tensor(NULL, 4, data), y;
    strait_call *call;
    strait_result *result;
    char *report;
    OK(strait_call_new(client, "standard/filter-finite", &call));
    OK(strait_call_tensor(call, "x", &t));
    OK(strait_call_publish(call, "y", "c-finite", true));
    OK(strait_call_verify(call, true));
    OK(strait_call_deadline(call, 20000));
    OK(strait_call_lease(call, 60000));
    OK(strait_call_inline_bytes(call, 0));
    /* Another run of this program is another request. */
    char key[32];
    snprintf(key, sizeof key, "c-key-%d", (int)getpid());
    OK(strait_call_idempotency_key(call, key));
    OK(strait_call_send(call, &result));
    OK(strait_result_tensor(result, "y", &y));
    WANT(y.shape[0] == 3 && !strcmp(strait_result_note(result, "dropped"), "1"));
    WANT(!strait_result_note(result, "other") && strait_result_copied_bytes(result) > 0);
    OK(strait_result_report(result, &report));
    WANT(strstr(report, "\"inode\""));
    strait_text_free(report);
    strait_result_free(result);
    OK(strait_drop(client, "c-finite"));
    strait_call_free(call);

    OK(strait_call_new(client, "cast", &call));
    OK(strait_call_tensor(call, "x", &t));
    OK(strait_call_param_text(call, "to", "float32"));
    FAILS(strait_call_param_text(call, "to", NULL), "BAD_ARGUMENT", "`value` is NULL");
    OK(strait_call_send(call, &result));
    OK(strait_result_tensor(result, "y", &y));
    WANT(y.dtype == STRAIT_DTYPE_FLOAT32 && y.bytes == 16 && ((const float *)y.data)[3] == 4);
    strait_result_free(result);
    strait_call_free(call);

    call = scale(client, 1);
    OK(strait_call_tensor(call, "x", &t));
    OK(strait_call_param_bool(call, "a", true));
    FAILS(strait_call_send(call, &result), "BAD_PARAMETER", "`a`");
    int64_t ints[2] = {INT64_MIN, 1};
    OK(strait_call_param_ints(call, "a", ints, 2));
    FAILS(strait_call_send(call, &result), "BAD_PARAMETER", "`a`");
    double reals[2] = {INFINITY, 0.5};
    OK(strait_call_param_reals(call, "a", reals, 2));
    FAILS(strait_call_send(call, &result), "BAD_PARAMETER", "`a`");
    FAILS(strait_call_param_reals(call, "a", NULL, 2), "BAD_ARGUMENT", "`values` is NULL");
    OK(strait_call_param_uint(call, "a", UINT64_MAX));
    OK(strait_call_send(call, &result));
    strait_result_free(result);
    strait_call_free(call);
}

static void *canceller(void *call) {
    usleep(200000);
    strait_call_cancel(call);
    return NULL;
}

/* Guests of the tests: one that spins and one that traps. */
static void guests(strait_client *client) {
    double data[4] = {1, 2, 3, 4};
    strait_tensor t = tensor(NULL, 4, data);
    strait_call *call;
    strait_result *result;
    strait_operation *op;
    pthread_t thread;
    OK(strait_call_new(client, "traps/k", &call));
    OK(strait_call_tensor(call, "x", &t));
    strait_error *error = strait_call_send(call, &result);
    WANT(error && strait_error_backtrace(error) && strait_error_backtrace(error)[0]);
    FAILS(error, "GUEST_TRAP", "");
    strait_call_free(call);
    OK(strait_call_new(client, "spins/k", &call));
    OK(strait_call_tensor(call, "x", &t));
    WANT(!pthread_create(&thread, NULL, canceller, call));
    FAILS(strait_call_send(call, &result), "CANCELLED", "");
    pthread_join(thread, NULL);
    OK(strait_call_start(call, &op));
    WANT(!strait_operation_poll(op));
    strait_call_cancel(call);
    FAILS(strait_finish_result(waited(op), &result), "CANCELLED", "");
    /* One that is given up is cancelled. */
    OK(strait_call_start(call, &op));
    strait_operation_free(op);
    OK(strait_call_deadline(call, 100));
    FAILS(strait_call_send(call, &result), "DEADLINE", "");
    /* So is a prepared one, and what was prepared is over. */
    strait_prepared *prepared;
    strait_tensor out;
    OK(strait_call_deadline(call, 60000));
    OK(strait_call_each(call, "x", &t));
    OK(strait_prepare(call, &prepared));
    OK(strait_prepared_call_start(prepared, &t, 1, &op));
    WANT(!strait_operation_poll(op));
    bool cancelled = false;
    while (!cancelled) {
        OK(strait_prepared_cancel(prepared, &cancelled));
    }
    FAILS(strait_finish_outputs(op, &out, 1), "CANCELLED", "");
    strait_prepared_free(prepared);
    /* If the host has not begun when it is told, the deadline ends it. */
    OK(strait_call_deadline(call, 1000));
    OK(strait_prepare(call, &prepared));
    OK(strait_prepared_call_start(prepared, &t, 1, &op));
    strait_operation_free(op);
    FAILS(strait_prepared_call(prepared, &t, 1, &out, 1), "WRONG_STATE", "given up");
    strait_prepared_free(prepared);
    strait_call_free(call);
    for (;;) {
        char *text;
        OK(strait_stats(client, &text));
        bool idle = strstr(text, "\"running\":0");
        strait_text_free(text);
        if (idle) {
            return;
        }
        usleep(20000);
    }
}

static void started(strait_client *client) {
    double data[70000];
    for (int i = 0; i < 70000; i++) {
        data[i] = i;
    }
    strait_operation *op;
    strait_client *other;
    OK(strait_connect_start(NULL, NULL, &op));
    OK(strait_finish_client(waited(op), &other));
    strait_client_free(other);
    strait_tensor t = tensor("x", 70000, data), y;
    strait_segment *x;
    OK(strait_put_start(client, "c-s", &t, true, &op));
    OK(strait_finish(waited(op)));
    OK(strait_map_start(client, "c-s", &op));
    OK(strait_finish_segment(op, &x));
    strait_segment_free(x);
    OK(strait_map_start(client, "nowhere", &op));
    FAILS(strait_finish_segment(waited(op), &x), "FLIGHT_NOT_FOUND", "nowhere");
    WANT(!x);
    char *text;
    OK(strait_list_start(client, &op));
    OK(strait_finish_text(waited(op), &text));
    WANT(strstr(text, "c-s"));
    strait_text_free(text);
    OK(strait_kernels_start(client, NULL, &op));
    FAILS(strait_finish(waited(op)), "BAD_ARGUMENT", "does not end with nothing");
    OK(strait_stats_start(client, &op));
    strait_operation_free(op);
    OK(strait_drop_start(client, "c-s", &op));
    OK(strait_finish(waited(op)));

    t.data = NULL, t.bytes = 0;
    void *room;
    OK(strait_create_start(client, &t, 1, &op));
    OK(strait_finish_segment(waited(op), &x));
    OK(strait_segment_fill(x, NULL, &room, NULL));
    memcpy(room, data, sizeof data);
    strait_call *call = scale(client, 2);
    OK(strait_call_segment(call, "x", x, NULL));
    /* Many at once; the call, and in the end the segment, are freed before they are done. */
    strait_operation *many[8];
    for (int i = 0; i < 8; i++) {
        OK(strait_call_start(call, &many[i]));
    }
    strait_call_free(call);
    strait_result *result;
    for (int i = 0; i < 8; i++) {
        OK(strait_finish_result(waited(many[i]), &result));
        OK(strait_result_tensor(result, "y", &y));
        WANT(((const double *)y.data)[69999] == 2.0 * 69999);
        strait_result_free(result);
    }
    OK(strait_segment_publish_start(x, "c-p", true, &op));
    OK(strait_finish(waited(op)));
    strait_segment_free(x);
    OK(strait_drop(client, "c-p"));
}

static void prepared_calls(strait_client *client) {
    double data[4] = {1, 2, 3, 4};
    strait_tensor t = tensor(NULL, 4, data), out[2], spec;
    strait_call *call = scale(client, 2);
    OK(strait_call_each(call, "x", &t));
    strait_prepared *prepared;
    OK(strait_prepare(call, &prepared));
    WANT(strait_prepared_inputs(prepared) == 1 && strait_prepared_outputs(prepared) == 1);
    OK(strait_prepared_input(prepared, 0, &spec));
    WANT(!strcmp(spec.name, "x") && spec.shape[0] == 4 && !spec.data);
    FAILS(strait_prepared_output(prepared, 1, &spec), "BAD_ARGUMENT", "number 1 of 1");
    OK(strait_prepared_call(prepared, &t, 1, out, 2));
    WANT(out[0].bytes == 32 && ((const double *)out[0].data)[3] == 8);
    FAILS(strait_prepared_call(prepared, &t, 1, out, 0), "BAD_ARGUMENT", "room for 0");
    FAILS(strait_prepared_call(prepared, &t, 0, out, 1), "BAD_ARGUMENT", "0 inputs");
    strait_tensor longer = t;
    double five[5] = {0};
    longer.shape[0] = 5, longer.bytes = 40, longer.data = five;
    FAILS(strait_prepared_call(prepared, &longer, 1, out, 1), "BAD_ARGUMENT", "[5]");
    strait_operation *op;
    for (int i = 0; i < 20; i++) {
        data[3] = i;
        OK(strait_prepared_call_start(prepared, &t, 1, &op));
        strait_error *busy = strait_prepared_call(prepared, &t, 1, out, 1);
        /* Unless it was here at once. */
        if (busy) {
            FAILS(busy, "WRONG_STATE", "under way");
        }
        OK(strait_finish_outputs(i % 2 ? waited(op) : op, out, 1));
        WANT(((const double *)out[0].data)[3] == 2 * i);
    }
    WANT(!strait_prepared_note(prepared, "any"));
    char *report;
    OK(strait_prepared_report(prepared, &report));
    WANT(!strcmp(report, "{\"notes\":[]}"));
    strait_text_free(report);
    /* Nothing is under way; but the host may still make the next call ready. */
    OK(strait_prepared_cancel(prepared, NULL));
    OK(strait_prepare_start(call, &op));
    strait_prepared *second;
    OK(strait_finish_prepared(waited(op), &second));
    strait_prepared_free(second);
    OK(strait_call_seal(call, true));
    FAILS(strait_prepare(call, &second), "BAD_ARGUMENT", "no seal");
    strait_call_free(call);
    strait_prepared_free(prepared);
}

static void streams(strait_client *client) {
    double chunk[3] = {1, 2, 3};
    strait_tensor t = tensor(NULL, 3, chunk), y;
    strait_call *call;
    OK(strait_call_new(client, "cumsum", &call));
    OK(strait_call_each(call, "x", &t));
    strait_stream *stream;
    strait_result *result;
    strait_operation *op;
    OK(strait_prepare_stream(call, &stream));
    WANT(strait_stream_inputs(stream) == 1);
    OK(strait_stream_input(stream, 0, &y));
    WANT(y.shape[0] == 3 && !strcmp(y.name, "x"));
    for (int round = 0; round < 2; round++) {
        double sum = 0;
        uint64_t rows = 0;
        for (int i = 0; i < 4; i++) {
            if (round == 0) {
                OK(strait_stream_chunk(stream, &t, 1, i == 3, &result));
            } else {
                OK(strait_stream_chunk_start(stream, &t, 1, i == 3, &op));
                OK(strait_finish_result(waited(op), &result));
            }
            OK(strait_result_tensor(result, "y", &y));
            rows += y.shape[0];
            sum = y.shape[0] ? ((const double *)y.data)[y.shape[0] - 1] : sum;
            strait_segment *none;
            FAILS(strait_result_take(result, "y", &none), "BAD_ARGUMENT", "rows of a stream");
            strait_result_free(result);
        }
        WANT(rows == 12 && sum == 24);
    }
    strait_stream_free(stream);
    OK(strait_prepare_stream_start(call, &op));
    OK(strait_finish_stream(waited(op), &stream));
    strait_stream_free(stream);
    strait_call_free(call);
}

static void *caller(void *client) {
    double data[4] = {1, 2, 3, 4};
    strait_tensor t = tensor(NULL, 4, data), y;
    strait_call *call = scale(client, 2);
    OK(strait_call_tensor(call, "x", &t));
    for (int i = 0; i < 25; i++) {
        strait_result *result;
        OK(strait_call_send(call, &result));
        OK(strait_result_tensor(result, "y", &y));
        WANT(((const double *)y.data)[3] == 8);
        strait_result_free(result);
    }
    strait_call_free(call);
    return NULL;
}

static void threads(strait_client *client) {
    pthread_t all[6];
    for (int i = 0; i < 6; i++) {
        WANT(!pthread_create(&all[i], NULL, caller, client));
    }
    for (int i = 0; i < 6; i++) {
        pthread_join(all[i], NULL);
    }
}

static void a_fork(strait_client *client) {
    pid_t child = fork();
    if (!child) {
        char *text;
        strait_error *error = strait_list(client, &text);
        bool forked = error && strait_error_get_kind(error) == STRAIT_ERROR_KIND_FORKED;
        /* Not _exit: valgrind would count what the parent's handles have here as lost. */
        execl(forked ? "/bin/true" : "/bin/false", "child", NULL);
        _exit(1);
    }
    int status;
    WANT(waitpid(child, &status, 0) == child && WIFEXITED(status) && !WEXITSTATUS(status));
}

int main(void) {
    WANT(STRAIT_ABI_MATCHES() && strait_version()[0]);
    WANT(strait_dtype_named("float64") == STRAIT_DTYPE_FLOAT64 && !strcmp(strait_dtype_name(12), "float8_e4m3fn"));
    nothing_is_fine();
    addresses();
    strait_options options = {.name = "strait-c-test/1"};
    strait_client *client, *same;
    OK(strait_connect(NULL, &options, &client));
    WANT(strait_client_host_id(client)[0] && strait_client_move_min_bytes(client) > 0);
    FAILS(strait_client_with_request_id(client, "a b", &same), "BAD_ARGUMENT", "a b");
    OK(strait_client_with_request_id(client, "c-id", &same));
    strait_segment *none;
    strait_error *error = strait_map(same, "nowhere", &none);
    WANT(error && !strcmp(strait_error_request_id(error), "c-id"));
    FAILS(error, "FLIGHT_NOT_FOUND", "nowhere");
    strait_client_free(same);
    tensors_that_are_wrong(client);
    flights(client);
    calls(client);
    settings(client);
    guests(client);
    started(client);
    prepared_calls(client);
    streams(client);
    threads(client);
    a_fork(client);
    strait_client_close(client);
    FAILS(strait_map(client, "x", &none), "DISCONNECTED", "new connection");
    strait_client_free(client);
    puts("all of strait.h");
    return 0;
}
