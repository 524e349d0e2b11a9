#include "driver.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

json *answer_ok(void) {
    json *answer = json_object_new_object();
    json_object_object_add(answer, "ok", json_object_new_boolean(true));
    return answer;
}

json *failure(const char *kind, const char *message) {
    json *answer = json_object_new_object();
    json_object_object_add(answer, "ok", json_object_new_boolean(false));
    put_text(answer, "kind", kind);
    put_text(answer, "message", message);
    return answer;
}

static const char *kind_of(const strait_error *error) {
    switch (strait_error_get_kind(error)) {
    case STRAIT_ERROR_KIND_REMOTE:
        return "remote";
    case STRAIT_ERROR_KIND_LEASE_EXPIRED:
        return "lease_expired";
    case STRAIT_ERROR_KIND_DISCONNECTED:
        return "disconnected";
    case STRAIT_ERROR_KIND_NO_HOST:
        return "no_host";
    case STRAIT_ERROR_KIND_FORKED:
        return "forked";
    case STRAIT_ERROR_KIND_ARGUMENT:
    case STRAIT_ERROR_KIND_STATE:
    case STRAIT_ERROR_KIND_UNSUPPORTED:
        return "argument";
    default:
        /* A bug of the library, or a machine without memory: no case expects it. */
        return "driver";
    }
}

json *failure_of(strait_error *error) {
    if (!error) {
        return NULL;
    }
    json *answer = failure(kind_of(error), strait_error_message(error));
    if (strait_error_get_kind(error) == STRAIT_ERROR_KIND_REMOTE) {
        put_text(answer, "code", strait_error_code(error));
        put_text(answer, "reason", strait_error_reason(error));
        put_text(answer, "request_id", strait_error_request_id(error));
        put_text(answer, "backtrace", strait_error_backtrace(error));
    }
    strait_error_free(error);
    return answer;
}

json *mistake(const char *format, ...) {
    char message[512];
    va_list values;
    va_start(values, format);
    vsnprintf(message, sizeof message, format, values);
    va_end(values);
    return failure("driver", message);
}

json *field(json *request, const char *name) {
    return json_object_object_get(request, name);
}

const char *text_field(json *request, const char *name) {
    json *value = field(request, name);
    return json_object_is_type(value, json_type_string) ? json_object_get_string(value) : NULL;
}

uint64_t number_field(json *request, const char *name, uint64_t otherwise) {
    json *value = field(request, name);
    return json_object_is_type(value, json_type_int) ? json_object_get_uint64(value) : otherwise;
}

bool flag_field(json *request, const char *name, bool otherwise) {
    json *value = field(request, name);
    return json_object_is_type(value, json_type_boolean) ? json_object_get_boolean(value) : otherwise;
}

void put_text(json *answer, const char *name, const char *text) {
    if (text) {
        json_object_object_add(answer, name, json_object_new_string(text));
    }
}

void put_number(json *answer, const char *name, uint64_t number) {
    json_object_object_add(answer, name, json_object_new_uint64(number));
}

json *parsed(char *text) {
    json *value = json_tokener_parse(text);
    strait_text_free(text);
    return value;
}
