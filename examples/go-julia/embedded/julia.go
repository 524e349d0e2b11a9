package main

/*
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// Debian's julia package comes without julia.h; these are its declarations of what is used here.
typedef struct _jl_value_t jl_value_t;
void jl_parse_opts(int *argcp, char ***argvp);
void jl_init_with_image__threading(const char *julia_bindir, const char *image_relative_path);
jl_value_t *jl_eval_string(const char *str);
jl_value_t *jl_exception_occurred(void);
const char *jl_typeof_str(jl_value_t *v);
void *jl_unbox_voidpointer(jl_value_t *v);
void jl_atexit_hook(int status);

// Go's runtime handles this process's signals.
static void options(void) {
	static char *arguments[] = {"julia", "--handle-signals=no", "--startup-file=no", NULL};
	char **argv = arguments;
	int argc = 3;
	jl_parse_opts(&argc, &argv);
}

static double call_total(void *total, const double *elements, int64_t count) {
	return ((double (*)(const double *, int64_t))total)(elements, count);
}
static double call_total_kept(void *total) { return ((double (*)(void))total)(); }
static double *call_fresh(void *fresh, int64_t count) { return ((double *(*)(int64_t))fresh)(count); }
*/
import "C"

import (
	"errors"
	"fmt"
	"unsafe"
)

// program defines what this process calls in Julia. Arrays are globals, so that the garbage
// collector sees them while only Go has their address.
const program = `
include(%q)
const kept = Vector{Float64}(undef, %d)
fill!(kept, 0.0)
const fresh = Ref(Float64[])
make_fresh(count) = (fresh[] = Vector{Float64}(undef, count); pointer(fresh[]))
total_kept() = total(kept)
total_fresh() = total(fresh[])
total_lent(elements, count) = total(unsafe_wrap(Array, elements, count))
`

type julia struct {
	kept *C.double
	// C functions that Julia compiled.
	fresh, totalKept, totalFresh, totalLent unsafe.Pointer
}

// reduction sums what was handed over.
type reduction func() float64

func start(binaries, image, reduce string, count int) (*julia, error) {
	C.options()
	cBinaries, cImage := C.CString(binaries), C.CString(image)
	defer C.free(unsafe.Pointer(cBinaries))
	defer C.free(unsafe.Pointer(cImage))
	C.jl_init_with_image__threading(cBinaries, cImage)
	if _, err := evaluate(fmt.Sprintf(program, reduce, count)); err != nil {
		return nil, err
	}
	j := &julia{}
	var errs [5]error
	var kept unsafe.Pointer
	kept, errs[0] = pointer("pointer(kept)")
	j.fresh, errs[1] = pointer("@cfunction(make_fresh, Ptr{Float64}, (Int64,))")
	j.totalKept, errs[2] = pointer("@cfunction(total_kept, Float64, ())")
	j.totalFresh, errs[3] = pointer("@cfunction(total_fresh, Float64, ())")
	j.totalLent, errs[4] = pointer("@cfunction(total_lent, Float64, (Ptr{Float64}, Int64))")
	j.kept = (*C.double)(kept)
	return j, errors.Join(errs[:]...)
}

func (j *julia) stop() { C.jl_atexit_hook(0) }

func evaluate(code string) (*C.jl_value_t, error) {
	text := C.CString("begin\n" + code + "\nend")
	defer C.free(unsafe.Pointer(text))
	value := C.jl_eval_string(text)
	if thrown := C.jl_exception_occurred(); thrown != nil {
		return nil, fmt.Errorf("Julia threw a %s at: %s", C.GoString(C.jl_typeof_str(thrown)), code)
	}
	return value, nil
}

func pointer(code string) (unsafe.Pointer, error) {
	value, err := evaluate("Ptr{Cvoid}(" + code + ")")
	if err != nil {
		return nil, err
	}
	return C.jl_unbox_voidpointer(value), nil
}

func copyElements(to *C.double, y []float64) {
	C.memcpy(unsafe.Pointer(to), unsafe.Pointer(unsafe.SliceData(y)), C.size_t(len(y)*8))
}

func (j *julia) copyTo(to *C.double) func([]float64) reduction {
	return func(y []float64) reduction {
		copyElements(to, y)
		return func() float64 { return float64(C.call_total_kept(j.totalKept)) }
	}
}

func (j *julia) copyToNew(y []float64) reduction {
	copyElements(C.call_fresh(j.fresh, C.int64_t(len(y))), y)
	return func() float64 { return float64(C.call_total_kept(j.totalFresh)) }
}

func (j *julia) lend(y []float64) reduction {
	return func() float64 {
		return float64(C.call_total(j.totalLent, (*C.double)(unsafe.SliceData(y)), C.int64_t(len(y))))
	}
}
