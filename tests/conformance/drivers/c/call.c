#include "driver.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static atomic_uint_least64_t begun;

uint64_t calls_begun(void) {
    return atomic_load(&begun);
}

void forget_calls(void) {
    atomic_store(&begun, 0);
}

void sleep_ms(uint64_t milliseconds) {
    struct timespec time = {.tv_sec = (time_t)(milliseconds / 1000), .tv_nsec = (long)(milliseconds % 1000) * 1000000};
    nanosleep(&time, NULL);
}

double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* What a call is given. */

static json *give_input(strait_call *call, const char *port, json *input) {
    if (json_object_is_type(input, json_type_string)) {
        return failure_of(strait_call_flight(call, port, json_object_get_string(input)));
    }
    if (text_field(input, "dtype")) {
        strait_tensor spec;
        MUST(spec_of(input, &spec));
        return failure_of(strait_call_each(call, port, &spec));
    }
    handle *handle;
    MUST(find_handle(text_field(input, "handle"), &handle));
    if (handle->segment) {
        return failure_of(strait_call_segment(call, port, handle->segment, NULL));
    }
    return failure_of(strait_call_tensor(call, port, &handle->tensor));
}

static bool is_each(json *list, json_type type) {
    size_t count = json_object_array_length(list);
    for (size_t index = 0; index < count; index++) {
        if (!json_object_is_type(json_object_array_get_idx(list, index), type)) {
            return false;
        }
    }
    return count > 0;
}

/* Integers that an int64_t has not all are told in JSON, as lists of several types are. */
static bool are_small(json *list) {
    for (size_t index = 0; index < json_object_array_length(list); index++) {
        if (json_object_get_uint64(json_object_array_get_idx(list, index)) > INT64_MAX) {
            return false;
        }
    }
    return true;
}

static strait_error *give_list(strait_call *call, const char *name, json *list) {
    size_t count = json_object_array_length(list);
    strait_error *error;
    if (is_each(list, json_type_int) && are_small(list)) {
        int64_t *values = malloc(count * sizeof *values);
        for (size_t index = 0; index < count; index++) {
            values[index] = json_object_get_int64(json_object_array_get_idx(list, index));
        }
        error = strait_call_param_ints(call, name, values, count);
        free(values);
    } else if (is_each(list, json_type_double)) {
        double *values = malloc(count * sizeof *values);
        for (size_t index = 0; index < count; index++) {
            values[index] = json_object_get_double(json_object_array_get_idx(list, index));
        }
        error = strait_call_param_reals(call, name, values, count);
        free(values);
    } else {
        error = strait_call_param_json(call, name, json_object_to_json_string(list));
    }
    return error;
}

static strait_error *give_text(strait_call *call, const char *name, const char *text) {
    static const struct {
        const char *text;
        double value;
    } reals[] = {{"nan", NAN}, {"inf", INFINITY}, {"-inf", -INFINITY}};
    for (size_t index = 0; index < sizeof reals / sizeof *reals; index++) {
        if (!strcmp(text, reals[index].text)) {
            return strait_call_param_real(call, name, reals[index].value);
        }
    }
    return strait_call_param_text(call, name, text);
}

static strait_error *give_parameter(strait_call *call, const char *name, json *value) {
    switch (json_object_get_type(value)) {
    case json_type_int:
        if (json_object_get_uint64(value) > INT64_MAX) {
            return strait_call_param_uint(call, name, json_object_get_uint64(value));
        }
        return strait_call_param_int(call, name, json_object_get_int64(value));
    case json_type_double:
        return strait_call_param_real(call, name, json_object_get_double(value));
    case json_type_boolean:
        return strait_call_param_bool(call, name, json_object_get_boolean(value));
    case json_type_string:
        return give_text(call, name, json_object_get_string(value));
    case json_type_array:
        return give_list(call, name, value);
    default:
        return strait_call_param_json(call, name, json_object_to_json_string(value));
    }
}

json *dress(strait_call *call, json *request) {
    json *inputs = field(request, "inputs"), *parameters = field(request, "parameters");
    if (inputs) {
        json_object_object_foreach(inputs, port, input) {
            MUST(give_input(call, port, input));
        }
    }
    if (parameters) {
        json_object_object_foreach(parameters, name, value) {
            TRY(give_parameter(call, name, value));
        }
    }
    TRY(strait_call_deadline(call, number_field(request, "deadline_ms", 0)));
    const char *id = text_field(request, "request_id");
    return id ? failure_of(strait_call_request_id(call, id)) : NULL;
}

/* What only a call can say. */
static json *dress_call(strait_call *call, json *request) {
    json *publish = field(request, "publish");
    MUST(dress(call, request));
    if (publish) {
        json_object_object_foreach(publish, port, name) {
            TRY(strait_call_publish(call, port, json_object_get_string(name), flag_field(request, "replace", false)));
        }
    }
    TRY(strait_call_lease(call, number_field(request, "lease_ms", 0)));
    TRY(strait_call_verify(call, flag_field(request, "verify", false)));
    if (field(request, "inline_bytes")) {
        TRY(strait_call_inline_bytes(call, number_field(request, "inline_bytes", 0)));
    }
    return NULL;
}

/* Runs. */

typedef struct {
    strait_call *call;
    uint64_t after_ms;
} cancel;

static void *cancel_later(void *of) {
    cancel *cancel = of;
    sleep_ms(cancel->after_ms);
    strait_call_cancel(cancel->call);
    return NULL;
}

static strait_error *send_call(strait_call *call, uint64_t cancel_after_ms, strait_result **result) {
    atomic_fetch_add(&begun, 1);
    if (!cancel_after_ms) {
        return strait_call_send(call, result);
    }
    cancel later = {call, cancel_after_ms};
    pthread_t thread;
    bool started = !pthread_create(&thread, NULL, cancel_later, &later);
    strait_error *error = strait_call_send(call, result);
    if (started) {
        pthread_join(thread, NULL);
    }
    return error;
}

json *tell_output(json *outputs, json *files, const strait_tensor *tensor) {
    const char *file = files ? text_field(files, tensor->name) : NULL;
    if (file) {
        MUST(write_file(file, tensor));
    }
    json *told = json_object_new_object();
    describe(told, tensor);
    json_object_object_add(outputs, tensor->name, told);
    return NULL;
}

/* Adds what the result says to the answer, and keeps of it what the request wants kept. */
static json *tell(json *answer, json *request, strait_result *result) {
    json *outputs = json_object_new_object(), *kept = field(request, "as");
    json_object_object_add(answer, "outputs", outputs);
    for (size_t index = 0; index < strait_result_count(result); index++) {
        strait_tensor tensor;
        TRY(strait_result_tensor(result, strait_result_port(result, index), &tensor));
        MUST(tell_output(outputs, field(request, "files"), &tensor));
    }
    char *report;
    TRY(strait_result_report(result, &report));
    json *told = parsed(report);
    json_object_object_add(answer, "notes", json_object_get(field(told, "notes")));
    json_object_object_add(answer, "pages", json_object_get(field(told, "pages")));
    json_object_put(told);
    put_number(answer, "copied_bytes", strait_result_copied_bytes(result));
    if (kept) {
        json_object_object_foreach(kept, port, name) {
            strait_segment *segment;
            TRY(strait_result_take(result, port, &segment));
            keep(json_object_get_string(name), segment);
        }
    }
    return NULL;
}

static json *run(json *answer, json *request, strait_call *call) {
    uint64_t repeat = number_field(request, "repeat", 1), before = strait_client_copied_bytes(session);
    json *seconds = json_object_new_array();
    json_object_object_add(answer, "seconds", seconds);
    MUST(dress_call(call, request));
    strait_result *result = NULL;
    for (uint64_t index = 0; index < repeat; index++) {
        strait_result_free(result);
        double start = now();
        TRY(send_call(call, number_field(request, "cancel_after_ms", 0), &result));
        json_object_array_add(seconds, json_object_new_double(now() - start));
    }
    json *failed = tell(answer, request, result);
    strait_result_free(result);
    /* Of others at the same time, too. */
    put_number(answer, "client_copied_bytes", strait_client_copied_bytes(session) - before);
    return failed;
}

json *op_call(json *request) {
    strait_call *call;
    TRY(strait_call_new(session, text_field(request, "kernel"), &call));
    json *answer = answer_ok(), *failed = run(answer, request, call);
    strait_call_free(call);
    if (failed) {
        json_object_put(answer);
        return failed;
    }
    return answer;
}

/* Callers at the same time. */

typedef struct {
    pthread_t thread;
    bool started;
    json *request;
    uint64_t repeat;
    json *answer;
} caller;

static void *many_calls(void *of) {
    caller *caller = of;
    for (uint64_t index = 0; index < caller->repeat; index++) {
        json_object_put(caller->answer);
        caller->answer = op_call(caller->request);
        if (!flag_field(caller->answer, "ok", false)) {
            break;
        }
    }
    return NULL;
}

json *op_concurrent(json *request) {
    json *calls = field(request, "calls"), *answers = json_object_new_array();
    size_t count = json_object_array_length(calls);
    caller *callers = calloc(count, sizeof *callers);
    for (size_t index = 0; index < count; index++) {
        callers[index].request = json_object_array_get_idx(calls, index);
        callers[index].repeat = number_field(request, "repeat", 1);
        callers[index].answer = mistake("no thread, or no call");
        callers[index].started = !pthread_create(&callers[index].thread, NULL, many_calls, &callers[index]);
    }
    for (size_t index = 0; index < count; index++) {
        if (callers[index].started) {
            pthread_join(callers[index].thread, NULL);
        }
        json_object_array_add(answers, callers[index].answer);
    }
    free(callers);
    json *answer = answer_ok();
    json_object_object_add(answer, "answers", answers);
    return answer;
}
