#include "driver.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

typedef struct prepared {
    char *name;
    strait_prepared *prepared;
    struct prepared *next;
} prepared;

static prepared *all;

static prepared **link_of(const char *name) {
    prepared **link = &all;
    while (*link && strcmp((*link)->name, name)) {
        link = &(*link)->next;
    }
    return link;
}

static void drop(const char *name) {
    prepared **link = link_of(name), *prepared = *link;
    if (prepared) {
        *link = prepared->next;
        strait_prepared_free(prepared->prepared);
        free(prepared->name);
        free(prepared);
    }
}

void drop_prepared(void) {
    while (all) {
        drop(all->name);
    }
}

json *op_close_prepared(json *request) {
    drop(text_field(request, "prepared"));
    return answer_ok();
}

/* How many there are of each, and what each is: of inputs, and of outputs. */
typedef size_t counted(const strait_prepared *prepared);
typedef strait_error *shown(const strait_prepared *prepared, size_t index, strait_tensor *spec);

static json *tell_specs(json *answer, const char *name, strait_prepared *prepared, counted *count, shown *show) {
    json *specs = json_object_new_array();
    json_object_object_add(answer, name, specs);
    for (size_t index = 0; index < count(prepared); index++) {
        strait_tensor spec;
        TRY(show(prepared, index, &spec));
        json *told = json_object_new_object();
        put_text(told, "port", spec.name);
        put_text(told, "dtype", strait_dtype_name(spec.dtype));
        json_object_object_add(told, "shape", shape_of(&spec));
        json_object_array_add(specs, told);
    }
    return NULL;
}

static json *prepare(json *answer, json *request, strait_call *call) {
    strait_prepared *made;
    MUST(dress(call, request));
    TRY(strait_prepare(call, &made));
    const char *name = text_field(request, "as");
    drop(name);
    prepared *kept = malloc(sizeof *kept);
    *kept = (prepared){.name = strdup(name), .prepared = made, .next = all};
    all = kept;
    MUST(tell_specs(answer, "inputs", made, strait_prepared_inputs, strait_prepared_input));
    return tell_specs(answer, "outputs", made, strait_prepared_outputs, strait_prepared_output);
}

json *op_prepare(json *request) {
    strait_call *call;
    TRY(strait_call_new(session, text_field(request, "kernel"), &call));
    json *answer = answer_ok(), *failed = prepare(answer, request, call);
    strait_call_free(call);
    if (failed) {
        json_object_put(answer);
        return failed;
    }
    return answer;
}

/* Calls. */

static json *bring(strait_tensor *tensor, json *input) {
    handle *handle;
    MUST(find_handle(text_field(input, "handle"), &handle));
    return view(handle, tensor);
}

static bool is_port(strait_prepared *prepared, const char *name) {
    for (size_t index = 0; index < strait_prepared_inputs(prepared); index++) {
        strait_tensor spec;
        json *failed = failure_of(strait_prepared_input(prepared, index, &spec));
        if (!failed && !strcmp(spec.name, name)) {
            return true;
        }
        json_object_put(failed);
    }
    return false;
}

/* By position: those that are brought, then any others. `tensors` has room for all of `inputs`. */
static json *bring_all(strait_prepared *prepared, json *inputs, strait_tensor *tensors, size_t *count) {
    *count = 0;
    for (size_t index = 0; index < strait_prepared_inputs(prepared); index++) {
        strait_tensor spec;
        TRY(strait_prepared_input(prepared, index, &spec));
        json *input = field(inputs, spec.name);
        if (input) {
            MUST(bring(&tensors[(*count)++], input));
        }
    }
    json_object_object_foreach(inputs, port, input) {
        if (!is_port(prepared, port)) {
            MUST(bring(&tensors[(*count)++], input));
        }
    }
    return NULL;
}

typedef struct {
    strait_prepared *prepared;
    uint64_t after_ms;
    atomic_bool over;
} cancel;

static void *cancel_later(void *of) {
    cancel *cancel = of;
    sleep_ms(cancel->after_ms);
    /* One that comes before the host has taken the call finds nothing to end. */
    while (!atomic_load(&cancel->over)) {
        bool cancelled;
        json *failed = failure_of(strait_prepared_cancel(cancel->prepared, &cancelled));
        bool done = failed || cancelled;
        json_object_put(failed);
        if (done) {
            break;
        }
        sleep_ms(2);
    }
    return NULL;
}

typedef struct {
    strait_prepared *prepared;
    strait_tensor *inputs, *outputs;
    size_t input_count, output_count;
} call;

static json *run(json *answer, json *request, const call *call) {
    json *seconds = json_object_new_array();
    json_object_object_add(answer, "seconds", seconds);
    uint64_t repeat = number_field(request, "repeat", 1), before = strait_client_copied_bytes(session);
    for (uint64_t index = 0; index < repeat; index++) {
        double start = now();
        TRY(strait_prepared_call(call->prepared, call->inputs, call->input_count, call->outputs, call->output_count));
        json_object_array_add(seconds, json_object_new_double(now() - start));
    }
    json *outputs = json_object_new_object();
    json_object_object_add(answer, "outputs", outputs);
    for (size_t index = 0; index < call->output_count; index++) {
        MUST(tell_output(outputs, field(request, "files"), &call->outputs[index]));
    }
    char *report;
    TRY(strait_prepared_report(call->prepared, &report));
    json *told = parsed(report);
    json_object_object_add(answer, "notes", json_object_get(field(told, "notes")));
    json_object_put(told);
    put_number(answer, "client_copied_bytes", strait_client_copied_bytes(session) - before);
    return NULL;
}

static json *call_and_cancel(json *answer, json *request, const call *call) {
    cancel later = {.prepared = call->prepared, .after_ms = number_field(request, "cancel_after_ms", 0)};
    pthread_t thread;
    bool started = later.after_ms && !pthread_create(&thread, NULL, cancel_later, &later);
    json *failed = run(answer, request, call);
    atomic_store(&later.over, true);
    if (started) {
        pthread_join(thread, NULL);
    }
    return failed;
}

json *op_call_prepared(json *request) {
    const char *name = text_field(request, "prepared");
    prepared *found = *link_of(name);
    if (!found) {
        return mistake("nothing is prepared as %s", name);
    }
    json *inputs = field(request, "inputs");
    call call = {.prepared = found->prepared, .output_count = strait_prepared_outputs(found->prepared)};
    call.inputs = calloc((size_t)json_object_object_length(inputs) + 1, sizeof *call.inputs);
    call.outputs = calloc(call.output_count + 1, sizeof *call.outputs);
    json *answer = answer_ok(), *failed = bring_all(found->prepared, inputs, call.inputs, &call.input_count);
    if (!failed) {
        failed = call_and_cancel(answer, request, &call);
    }
    free(call.inputs);
    free(call.outputs);
    if (failed) {
        json_object_put(answer);
        return failed;
    }
    return answer;
}
