/* The conformance driver of C: what its files have of each other. ../../README.md says what a driver is asked.
 *
 *     driver.c                    lines in, lines out, and what is no call
 *      └▶ call.c, prepared.c      calls
 *          └▶ array.c             handles: arrays under names, and where Linux has them
 *              └▶ answer.c        answers
 */

#ifndef DRIVER_H
#define DRIVER_H

#define _GNU_SOURCE

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <json-c/json.h>
#include <strait.h>

typedef struct json_object json;

/* The session; NULL before the first `connect`. It is replaced by `connect` alone, when nothing else runs. */
extern strait_client *session;

/* answer.c. What is called an answer is whole; a function that gives a failure or NULL gives NULL when all is well. */

json *answer_ok(void);
/* Of the client's error, which is freed; NULL for NULL. */
json *failure_of(strait_error *error);
/* Kind `driver`: this driver was asked for what it cannot do. */
json *mistake(const char *format, ...) __attribute__((format(printf, 1, 2)));
json *failure(const char *kind, const char *message);

/* Returns the failure of what the client or another function said, if it is one. */
#define TRY(call)                                                                                  \
    do {                                                                                           \
        json *failed_ = failure_of(call);                                                          \
        if (failed_) {                                                                             \
            return failed_;                                                                        \
        }                                                                                          \
    } while (0)
#define MUST(call)                                                                                 \
    do {                                                                                           \
        json *failed_ = (call);                                                                    \
        if (failed_) {                                                                             \
            return failed_;                                                                        \
        }                                                                                          \
    } while (0)

/* Fields of a request: what is missing is NULL, or `otherwise`. */
json *field(json *request, const char *name);
const char *text_field(json *request, const char *name);
uint64_t number_field(json *request, const char *name, uint64_t otherwise);
bool flag_field(json *request, const char *name, bool otherwise);

void put_text(json *answer, const char *name, const char *text);
void put_number(json *answer, const char *name, uint64_t number);
/* The JSON that the library answered, which is freed. */
json *parsed(char *text);

/* array.c */

typedef struct handle {
    char *name;
    /* Memory of the client; NULL for an ordinary array, and once it is released. */
    strait_segment *segment;
    /* An ordinary array, which is this driver's. */
    strait_tensor tensor;
    void *data;
    bool released;
    struct handle *next;
} handle;

/* The handle of that name, or the failure that it is released or not there. */
json *find_handle(const char *name, handle **found);
/* Keeps a segment under that name. */
void keep(const char *name, strait_segment *segment);
void drop_handle(const char *name);
void drop_handles(void);
size_t mappings(void);

/* The array of a handle, as long as that is there. */
json *view(const handle *handle, strait_tensor *tensor);
/* Dtype and shape that a request says. */
json *spec_of(json *request, strait_tensor *spec);
/* What an answer says of an array. */
void describe(json *answer, const strait_tensor *tensor);
json *shape_of(const strait_tensor *tensor);
json *write_file(const char *path, const strait_tensor *tensor);

json *op_make(json *request);
json *op_put(json *request);
json *op_get(json *request);
json *op_read(json *request);
json *op_write(json *request);
json *op_renew(json *request);
json *op_release(json *request);
json *op_forget(json *request);

/* call.c */

/* Gives the call the inputs and parameters of a request, and what else `call` and `prepare` both have. */
json *dress(strait_call *call, json *request);
/* An output in an answer, and in the file that the request has for its port. */
json *tell_output(json *outputs, json *files, const strait_tensor *tensor);
void sleep_ms(uint64_t milliseconds);
double now(void);
uint64_t calls_begun(void);
void forget_calls(void);

json *op_call(json *request);
json *op_concurrent(json *request);

/* prepared.c */

json *op_prepare(json *request);
json *op_call_prepared(json *request);
json *op_close_prepared(json *request);
void drop_prepared(void);

#endif
