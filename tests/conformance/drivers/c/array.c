#include "driver.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Threads of `concurrent` read it; it is changed when they are over. */
static handle *handles;

static handle **link_of(const char *name) {
    handle **link = &handles;
    while (*link && strcmp((*link)->name, name)) {
        link = &(*link)->next;
    }
    return link;
}

json *find_handle(const char *name, handle **found) {
    *found = name ? *link_of(name) : NULL;
    if (!*found) {
        return mistake("no handle %s", name ? name : "is named");
    }
    return (*found)->released ? failure("released", "the handle was released") : NULL;
}

static void let_go(handle *handle) {
    strait_segment_free(handle->segment);
    free(handle->data);
    handle->segment = NULL;
    handle->data = NULL;
    handle->released = true;
}

void drop_handle(const char *name) {
    handle **link = link_of(name), *handle = *link;
    if (handle) {
        *link = handle->next;
        let_go(handle);
        free(handle->name);
        free(handle);
    }
}

void drop_handles(void) {
    while (handles) {
        drop_handle(handles->name);
    }
}

static handle *new_handle(const char *name) {
    drop_handle(name);
    handle *made = calloc(1, sizeof *made);
    made->name = strdup(name);
    made->next = handles;
    handles = made;
    return made;
}

void keep(const char *name, strait_segment *segment) {
    new_handle(name)->segment = segment;
}

json *view(const handle *handle, strait_tensor *tensor) {
    if (handle->segment) {
        return failure_of(strait_segment_tensor(handle->segment, NULL, tensor));
    }
    *tensor = handle->tensor;
    return NULL;
}

json *spec_of(json *request, strait_tensor *spec) {
    const char *dtype = text_field(request, "dtype");
    json *shape = field(request, "shape");
    memset(spec, 0, sizeof *spec);
    spec->dtype = strait_dtype_named(dtype);
    if (!spec->dtype || !json_object_is_type(shape, json_type_array)) {
        return mistake("dtype %s, or no shape", dtype ? dtype : "missing");
    }
    size_t axes = json_object_array_length(shape);
    if (axes > STRAIT_DIMS_MAX) {
        return mistake("%zu axes", axes);
    }
    for (size_t axis = 0; axis < axes; axis++) {
        spec->shape[axis] = json_object_get_uint64(json_object_array_get_idx(shape, axis));
    }
    spec->ndim = (uint32_t)axes;
    return NULL;
}

/* Files. */

static json *read_file(const char *path, void **data, size_t *length) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        return mistake("%s: %s", path, strerror(errno));
    }
    fseek(file, 0, SEEK_END);
    *length = (size_t)ftell(file);
    rewind(file);
    /* malloc(0) may be NULL, which the client would take for a mistake. */
    *data = malloc(*length + 1);
    size_t got = fread(*data, 1, *length, file);
    fclose(file);
    if (got != *length) {
        free(*data);
        return mistake("%s: %zu of %zu bytes", path, got, *length);
    }
    return NULL;
}

json *write_file(const char *path, const strait_tensor *tensor) {
    FILE *file = fopen(path, "wb");
    if (!file) {
        return mistake("%s: %s", path, strerror(errno));
    }
    size_t written = tensor->bytes ? fwrite(tensor->data, 1, tensor->bytes, file) : 0;
    if (fclose(file) || written != tensor->bytes) {
        return mistake("%s: %zu of %" PRIu64 " bytes", path, written, tensor->bytes);
    }
    return NULL;
}

/* Where Linux has an address: both 0 where it has no inode. */
static void place(const void *address, uint64_t *device, uint64_t *inode) {
    FILE *maps = fopen("/proc/self/maps", "r");
    char *line = NULL;
    size_t room = 0;
    *device = *inode = 0;
    while (maps && getline(&line, &room, maps) > 0) {
        uintptr_t first, end;
        unsigned major, minor;
        uint64_t number;
        if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %*s %*s %x:%x %" SCNu64, &first, &end, &major, &minor, &number) == 5 &&
            first <= (uintptr_t)address && (uintptr_t)address < end) {
            *device = number ? (uint64_t)major << 8 | minor : 0;
            *inode = number;
            break;
        }
    }
    free(line);
    if (maps) {
        fclose(maps);
    }
}

json *shape_of(const strait_tensor *tensor) {
    json *shape = json_object_new_array();
    for (uint32_t axis = 0; axis < tensor->ndim; axis++) {
        json_object_array_add(shape, json_object_new_uint64(tensor->shape[axis]));
    }
    return shape;
}

void describe(json *answer, const strait_tensor *tensor) {
    uint64_t device = 0, inode = 0;
    if (tensor->bytes) {
        place(tensor->data, &device, &inode);
    }
    put_text(answer, "dtype", strait_dtype_name(tensor->dtype));
    json_object_object_add(answer, "shape", shape_of(tensor));
    put_number(answer, "bytes", tensor->bytes);
    put_number(answer, "device", device);
    put_number(answer, "inode", inode);
}

static json *array(const handle *handle) {
    strait_tensor tensor;
    MUST(view(handle, &tensor));
    json *answer = answer_ok();
    describe(answer, &tensor);
    return answer;
}

size_t mappings(void) {
    size_t count = 0;
    for (handle *handle = handles; handle; handle = handle->next) {
        strait_tensor tensor;
        uint64_t device = 0, inode = 0;
        json *failed = handle->segment ? view(handle, &tensor) : NULL;
        if (handle->segment && !failed) {
            place(tensor.data, &device, &inode);
        }
        json_object_put(failed);
        /* A small result is memory of this process. */
        count += inode != 0;
    }
    return count;
}

/* The operations. */

static json *fill(strait_segment *segment, const void *data, size_t length) {
    void *room;
    uint64_t bytes;
    TRY(strait_segment_fill(segment, "x", &room, &bytes));
    if (bytes != length) {
        return mistake("%zu bytes for %" PRIu64, length, bytes);
    }
    memcpy(room, data, length);
    return NULL;
}

static json *make(json *request, void *data, size_t length) {
    strait_tensor spec;
    MUST(spec_of(request, &spec));
    const char *name = text_field(request, "as");
    if (!strcmp(text_field(request, "how"), "segment")) {
        strait_segment *segment;
        spec.name = "x";
        TRY(strait_create(session, &spec, 1, &segment));
        keep(name, segment);
        MUST(fill(segment, data, length));
        return array(*link_of(name));
    }
    handle *made = new_handle(name);
    made->data = malloc(length + 1);
    memcpy(made->data, data, length);
    made->tensor = spec;
    made->tensor.data = made->data;
    made->tensor.bytes = length;
    return array(made);
}

json *op_make(json *request) {
    void *data;
    size_t length;
    MUST(read_file(text_field(request, "file"), &data, &length));
    json *answer = make(request, data, length);
    free(data);
    return answer;
}

json *op_put(json *request) {
    handle *handle;
    MUST(find_handle(text_field(request, "handle"), &handle));
    const char *name = text_field(request, "name");
    bool replace = flag_field(request, "replace", false);
    uint64_t before = strait_client_copied_bytes(session);
    if (handle->segment) {
        TRY(strait_segment_publish(handle->segment, name, replace));
    } else {
        TRY(strait_put(session, name, &handle->tensor, replace));
    }
    json *answer = answer_ok();
    put_number(answer, "copied_bytes", strait_client_copied_bytes(session) - before);
    return answer;
}

json *op_get(json *request) {
    strait_segment *segment;
    TRY(strait_map(session, text_field(request, "name"), &segment));
    const char *name = text_field(request, "as");
    keep(name, segment);
    uint64_t lease_ms = number_field(request, "lease_ms", 0);
    if (lease_ms) {
        TRY(strait_segment_renew(segment, lease_ms, NULL));
    }
    return array(*link_of(name));
}

json *op_read(json *request) {
    handle *handle;
    strait_tensor tensor;
    MUST(find_handle(text_field(request, "handle"), &handle));
    MUST(view(handle, &tensor));
    MUST(write_file(text_field(request, "file"), &tensor));
    return array(handle);
}

json *op_write(json *request) {
    handle *handle;
    void *data;
    size_t length;
    MUST(find_handle(text_field(request, "handle"), &handle));
    MUST(read_file(text_field(request, "file"), &data, &length));
    json *failed = fill(handle->segment, data, length);
    free(data);
    return failed ? failed : answer_ok();
}

json *op_renew(json *request) {
    handle *handle;
    uint64_t expires_ms;
    MUST(find_handle(text_field(request, "handle"), &handle));
    TRY(strait_segment_renew(handle->segment, number_field(request, "lease_ms", 0), &expires_ms));
    json *answer = answer_ok();
    put_number(answer, "expires_ms", expires_ms);
    return answer;
}

json *op_release(json *request) {
    handle *handle = *link_of(text_field(request, "handle"));
    if (handle) {
        let_go(handle);
    }
    return answer_ok();
}

json *op_forget(json *request) {
    drop_handle(text_field(request, "handle"));
    return answer_ok();
}
