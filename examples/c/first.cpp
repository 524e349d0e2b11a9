// first.c in C++: every handle is freed by its end of scope, every error is thrown.
// c++ -std=c++17 first.cpp $(pkg-config --cflags --libs strait) && ./a.out

#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>

#include <strait.h>

template <auto free> struct Free {
    template <typename T> void operator()(T *handle) const { free(handle); }
};
using Client = std::unique_ptr<strait_client, Free<strait_client_free>>;
using Segment = std::unique_ptr<strait_segment, Free<strait_segment_free>>;
using Call = std::unique_ptr<strait_call, Free<strait_call_free>>;
using Result = std::unique_ptr<strait_result, Free<strait_result_free>>;
using Error = std::unique_ptr<strait_error, Free<strait_error_free>>;

void check(strait_error *failed) {
    if (Error error{failed}) {
        throw std::runtime_error(std::string(strait_error_reason(error.get())) + ": " + strait_error_message(error.get()));
    }
}

// The handle that `make` puts where it is told.
template <typename Handle, typename Make> Handle made(Make make) {
    typename Handle::pointer handle = nullptr;
    check(make(&handle));
    return Handle(handle);
}

int main() try {
    auto client = made<Client>([](auto out) { return strait_connect(nullptr, nullptr, out); });
    strait_tensor spec{};
    spec.name = "x";
    spec.dtype = STRAIT_DTYPE_FLOAT64;
    spec.ndim = 2;
    spec.shape[0] = spec.shape[1] = 1000;
    auto x = made<Segment>([&](auto out) { return strait_create(client.get(), &spec, 1, out); });
    void *data;
    check(strait_segment_fill(x.get(), nullptr, &data, nullptr));
    for (int i = 0; i < 1000000; i++) {
        static_cast<double *>(data)[i] = i;
    }
    auto call = made<Call>([&](auto out) { return strait_call_new(client.get(), "zscore", out); });
    check(strait_call_segment(call.get(), "x", x.get(), nullptr));
    check(strait_call_param_int(call.get(), "axis", 0));
    auto result = made<Result>([&](auto out) { return strait_call_send(call.get(), out); });
    strait_tensor y;
    check(strait_result_tensor(result.get(), "y", &y));
    std::printf("first column, scaled: %f\n", static_cast<const double *>(y.data)[0]);
    std::printf("bytes that the host copied: %llu\n", static_cast<unsigned long long>(strait_result_copied_bytes(result.get())));
} catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
