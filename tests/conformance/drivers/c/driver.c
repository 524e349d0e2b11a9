#include "driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

strait_client *session;

static json *op_hello(json *request) {
    (void)request;
    char client[64];
    snprintf(client, sizeof client, "strait-c/%s", strait_version());
    json *answer = answer_ok();
    put_text(answer, "language", "c");
    put_text(answer, "client", client);
    put_text(answer, "fork", "refused");
    return answer;
}

static json *op_connect(json *request) {
    strait_options options = {.flags = flag_field(request, "renew", true) ? 0 : STRAIT_NO_RENEWAL};
    strait_client *client;
    drop_prepared();
    strait_client_close(session);
    strait_client_free(session);
    session = NULL;
    TRY(strait_connect(text_field(request, "address"), &options, &client));
    session = client;
    forget_calls();
    json *answer = answer_ok();
    put_text(answer, "host_id", strait_client_host_id(client));
    put_number(answer, "move_min_bytes", strait_client_move_min_bytes(client));
    put_number(answer, "inline_bytes", strait_client_inline_bytes(client));
    return answer;
}

static json *op_close(json *request) {
    (void)request;
    strait_client_close(session);
    return answer_ok();
}

static json *op_delete(json *request) {
    TRY(strait_drop(session, text_field(request, "name")));
    return answer_ok();
}

/* What the library answers in JSON, with these fields of each of a list. */
static json *told(const char *list, char *text, json *(*of)(json *each)) {
    json *whole = parsed(text), *from = field(whole, list), *to = json_object_new_array();
    for (size_t index = 0; index < json_object_array_length(from); index++) {
        json_object_array_add(to, of(json_object_array_get_idx(from, index)));
    }
    json_object_put(whole);
    json *answer = answer_ok();
    json_object_object_add(answer, list, to);
    return answer;
}

static void copy_field(json *to, json *from, const char *name) {
    json_object_object_add(to, name, json_object_get(field(from, name)));
}

static json *flight(json *flight) {
    json *answer = json_object_new_object(), *tensors = json_object_new_array();
    json *from = field(field(flight, "mapping"), "tensors");
    copy_field(answer, flight, "name");
    for (size_t index = 0; index < json_object_array_length(from); index++) {
        json *tensor = json_object_new_object(), *each = json_object_array_get_idx(from, index);
        copy_field(tensor, each, "name");
        copy_field(tensor, each, "dtype");
        copy_field(tensor, each, "shape");
        json_object_array_add(tensors, tensor);
    }
    json_object_object_add(answer, "tensors", tensors);
    return answer;
}

static json *op_list(json *request) {
    (void)request;
    char *text;
    TRY(strait_list(session, &text));
    return told("flights", text, flight);
}

static json *names_of(json *list) {
    json *names = json_object_new_array();
    for (size_t index = 0; index < json_object_array_length(list); index++) {
        json_object_array_add(names, json_object_get(field(json_object_array_get_idx(list, index), "name")));
    }
    return names;
}

static json *kernel(json *kernel) {
    json *answer = json_object_new_object();
    copy_field(answer, kernel, "name");
    copy_field(answer, kernel, "plugin");
    copy_field(answer, kernel, "doc");
    json_object_object_add(answer, "inputs", names_of(field(kernel, "inputs")));
    json_object_object_add(answer, "outputs", names_of(field(kernel, "outputs")));
    json_object_object_add(answer, "parameters", names_of(field(kernel, "parameters")));
    return answer;
}

static json *op_kernels(json *request) {
    (void)request;
    char *text;
    TRY(strait_kernels(session, NULL, &text));
    return told("kernels", text, kernel);
}

static json *op_stats(json *request) {
    (void)request;
    char *text;
    TRY(strait_stats(session, &text));
    json *answer = answer_ok();
    json_object_object_add(answer, "stats", parsed(text));
    return answer;
}

static json *op_client_stats(json *request) {
    (void)request;
    json *answer = answer_ok();
    put_number(answer, "copied_bytes", strait_client_copied_bytes(session));
    put_number(answer, "calls", calls_begun());
    put_number(answer, "mappings", mappings());
    return answer;
}

/* The child says how it went through a pipe. */
static json *op_fork(json *request) {
    int ends[2];
    char said[4096] = "";
    if (pipe(ends)) {
        return mistake("no pipe");
    }
    pid_t child = fork();
    if (child == 0) {
        const char *text = json_object_to_json_string(op_list(request));
        _exit(write(ends[1], text, strlen(text)) < 0);
    }
    close(ends[1]);
    ssize_t length = child < 0 ? -1 : read(ends[0], said, sizeof said - 1);
    close(ends[0]);
    if (length < 0 || waitpid(child, NULL, 0) < 0) {
        return mistake("the child says nothing");
    }
    json *answer = answer_ok();
    json_object_object_add(answer, "child", json_tokener_parse(said));
    return answer;
}

/* What is asked, by whom it is answered, and which texts it needs. */
static const struct {
    const char *op;
    json *(*answer)(json *request);
    const char *needs[4];
} operations[] = {
    {"hello", op_hello, {0}},
    {"connect", op_connect, {"address"}},
    {"close", op_close, {0}},
    {"make", op_make, {"as", "dtype", "file", "how"}},
    {"put", op_put, {"handle", "name"}},
    {"get", op_get, {"name", "as"}},
    {"read", op_read, {"handle", "file"}},
    {"write", op_write, {"handle", "file"}},
    {"call", op_call, {"kernel"}},
    {"prepare", op_prepare, {"as", "kernel"}},
    {"call_prepared", op_call_prepared, {"prepared"}},
    {"close_prepared", op_close_prepared, {"prepared"}},
    {"concurrent", op_concurrent, {0}},
    {"delete", op_delete, {"name"}},
    {"list", op_list, {0}},
    {"kernels", op_kernels, {0}},
    {"stats", op_stats, {0}},
    {"client_stats", op_client_stats, {0}},
    {"renew", op_renew, {"handle"}},
    {"release", op_release, {"handle"}},
    {"forget", op_forget, {"handle"}},
    {"fork", op_fork, {0}},
};

static json *answer_to(const char *op, json *request) {
    for (size_t index = 0; index < sizeof operations / sizeof *operations; index++) {
        if (strcmp(op, operations[index].op)) {
            continue;
        }
        for (size_t need = 0; need < 4 && operations[index].needs[need]; need++) {
            if (!text_field(request, operations[index].needs[need])) {
                return mistake("%s needs %s", op, operations[index].needs[need]);
            }
        }
        return operations[index].answer(request);
    }
    return mistake("unknown op %s", op);
}

static void say(json *answer) {
    puts(json_object_to_json_string_ext(answer, JSON_C_TO_STRING_PLAIN));
    fflush(stdout);
    json_object_put(answer);
}

int main(void) {
    char *line = NULL;
    size_t room = 0;
    bool over = false;
    while (!over && getline(&line, &room, stdin) > 0) {
        json *request = json_tokener_parse(line);
        const char *op = text_field(request, "op");
        over = op && !strcmp(op, "exit");
        say(over ? answer_ok() : op ? answer_to(op, request) : mistake("no JSON object with an op"));
        json_object_put(request);
    }
    free(line);
    drop_prepared();
    drop_handles();
    strait_client_free(session);
    return 0;
}
