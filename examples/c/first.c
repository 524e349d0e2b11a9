/* The first program: fill a tensor in shared memory, run a kernel over it, read the result.
 * It needs a host: `strait serve`. cc first.c $(pkg-config --cflags --libs strait) && ./a.out */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include <strait.h>

static void check(strait_error *error) {
    if (error) {
        fprintf(stderr, "%s: %s\n", strait_error_reason(error), strait_error_message(error));
        exit(1);
    }
}

int main(void) {
    strait_client *client;
    check(strait_connect(NULL, NULL, &client));
    strait_tensor spec = {.name = "x", .dtype = STRAIT_DTYPE_FLOAT64, .ndim = 2, .shape = {1000, 1000}};
    strait_segment *x;
    check(strait_create(client, &spec, 1, &x));
    void *data;
    check(strait_segment_fill(x, NULL, &data, NULL));
    for (int i = 0; i < 1000000; i++) {
        ((double *)data)[i] = i;
    }
    strait_call *call;
    strait_result *result;
    strait_tensor y;
    check(strait_call_new(client, "zscore", &call));
    check(strait_call_segment(call, "x", x, NULL));
    check(strait_call_param_int(call, "axis", 0));
    check(strait_call_send(call, &result));
    check(strait_result_tensor(result, "y", &y));
    printf("first column, scaled: %f\n", ((const double *)y.data)[0]);
    printf("bytes that the host copied: %" PRIu64 "\n", strait_result_copied_bytes(result));
    strait_result_free(result);
    strait_call_free(call);
    strait_segment_free(x);
    strait_client_free(client);
    return 0;
}
