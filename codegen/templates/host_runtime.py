"""The host runtime: a small C++ library, compiled once per machine, that every printed program calls.

It holds what would otherwise be repeated in each translation unit: the arena pool, the crossing from Python, the GEMM
and attention templates. Programs see it through `DECLARATIONS`; libtorch is reached through its stable C shim only.
"""

from __future__ import annotations

from . import cpu_attention, cpu_gemm

_HEAD = r"""
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <mutex>
#include <new>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif
#include <unistd.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#define MW_EXPORT __attribute__((visibility("default")))
"""

_ARENA = r"""
// ---- arenas: blocks that live between calls; a call takes one and gives it back, so two calls at once get two ----
struct Block {
  void* data;
  int64_t bytes;
};
static std::mutex arena_guard;
static std::vector<Block>& arena_free() {
  static auto* blocks = new std::vector<Block>;  // never destroyed: threads may outlive static destructors
  return *blocks;
}

extern "C" MW_EXPORT void* mw_arena_take(int64_t bytes, int64_t* taken) {
  bytes = std::max<int64_t>(bytes, 64);
  {
    std::lock_guard<std::mutex> hold(arena_guard);
    auto& blocks = arena_free();
    int best = -1;
    for (int i = 0; i < (int)blocks.size(); i++)
      if (blocks[i].bytes >= bytes && (best < 0 || blocks[i].bytes < blocks[best].bytes)) best = i;
    if (best >= 0) {
      Block found = blocks[best];
      blocks.erase(blocks.begin() + best);
      *taken = found.bytes;
      return found.data;
    }
    if (!blocks.empty()) {  // too small for this call: replace one rather than keep both
      std::free(blocks.back().data);
      blocks.pop_back();
    }
  }
  int64_t align = bytes >= (1 << 21) ? (1 << 21) : 64;
  int64_t rounded = (bytes + align - 1) / align * align;
  void* data = std::aligned_alloc(align, rounded);
  if (!data) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (align > 64) madvise(data, rounded, MADV_HUGEPAGE);
#endif
  *taken = rounded;
  return data;
}

extern "C" MW_EXPORT void mw_arena_give(void* data, int64_t bytes) {
  std::lock_guard<std::mutex> hold(arena_guard);
  arena_free().push_back({data, bytes});
}

// Bytes freed: every arena that no call is using.
extern "C" MW_EXPORT int64_t mw_arena_release() {
  std::lock_guard<std::mutex> hold(arena_guard);
  int64_t bytes = 0;
  for (Block& b : arena_free()) {
    bytes += b.bytes;
    std::free(b.data);
  }
  arena_free().clear();
  return bytes;
}
"""

_LAUNCH = r"""
// Rows [0, rows) of a kernel: split over the threads in whole blocks, or run here when `work` is small.
extern "C" MW_EXPORT void mw_launch(void (*run)(void* const*, const int64_t*, int64_t, int64_t), int threads,
                                    int64_t rows, int64_t work, void* const* tensors, const int64_t* sizes) {
  if (rows <= 0) return;
  if (threads <= 1 || rows == 1 || work < 16384) return run(tensors, sizes, 0, rows);
#pragma omp parallel num_threads(threads)
  {
    int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
    int64_t unit = rows >= 64 * 1024 ? 64 : 1;  // whole cache lines where a row is one element
    int64_t units = (rows + unit - 1) / unit;
    int64_t begin = units * part / parts * unit, end = std::min(rows, units * (part + 1) / parts * unit);
    if (begin < end) run(tensors, sizes, begin, end);
  }
}
"""

_CROSSING = r"""
// ---- crossing from Python: capsules in, capsules out; the interpreter's C API is declared, not included ----
extern "C" {
typedef struct _object PyObject;
PyObject* PyList_New(long);
long PyList_Size(PyObject*);
PyObject* PyList_GetItem(PyObject*, long);
int PyList_SetItem(PyObject*, long, PyObject*);
void* PyCapsule_GetPointer(PyObject*, const char*);
PyObject* PyCapsule_New(void*, const char*, void (*)(PyObject*));
PyObject* PyLong_FromLongLong(long long);
void PyErr_SetString(PyObject*, const char*);
void* PyEval_SaveThread();
void PyEval_RestoreThread(void*);
extern PyObject *PyExc_RuntimeError, *PyExc_IndexError;
int aoti_torch_delete_tensor_object(void*);
}
"""

# What a program is called with; the host fills it and programs read it.
_FRAME = cpu_gemm.WAY + r"""struct Frame {
  void** inputs;
  const int64_t* integers;
  void** outputs;
  int64_t* output_integers;
  const Way* products;
  const void* const* convolutions;
  int threads;
  int (*python)(int, void**, const int64_t*, void**);  // runs an operator that has no C form
  char error[2048];
};
"""

_CALL = r"""typedef int (*Entry)(Frame*);

// Runs `entry`; gives [capsules of the output tensors], output integers through `out_integers`. The input handles
// behind `capsules` are consumed. An error is raised.
extern "C" MW_EXPORT PyObject* mw_call(PyObject* capsules, Entry entry, const int64_t* integers, int64_t* out_integers,
                                       const Way* products, const void* const* convolutions,
                                       int (*python)(int, void**, const int64_t*, void**), int n_outputs, int threads) {
  long n = PyList_Size(capsules);
  std::vector<void*> in(n + 1), out(n_outputs + 1, nullptr);
  for (long i = 0; i < n; i++) in[i] = PyCapsule_GetPointer(PyList_GetItem(capsules, i), nullptr);
  Frame frame{in.data(), integers, out.data(), out_integers, products, convolutions, threads, python, {0}};
  void* state = PyEval_SaveThread();
  int status = entry(&frame);
  for (long i = 0; i < n; i++) aoti_torch_delete_tensor_object(in[i]);
  if (status)
    for (void* handle : out)
      if (handle) aoti_torch_delete_tensor_object(handle);
  PyEval_RestoreThread(state);
  if (status) {
    PyErr_SetString(status == 2 ? PyExc_IndexError : PyExc_RuntimeError, frame.error);
    return nullptr;
  }
  PyObject* result = PyList_New(n_outputs);
  for (int i = 0; i < n_outputs; i++) PyList_SetItem(result, i, PyCapsule_New(out[i], nullptr, nullptr));
  return result;
}
"""

SOURCE = _HEAD + cpu_gemm.SOURCE + cpu_attention.SOURCE + _ARENA + _LAUNCH + _CROSSING + _FRAME + _CALL

DECLARATIONS = r"""
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

// ---- torch's stable C shim (what this program may use) and the host runtime --------------------------------------
extern "C" {
int aoti_torch_delete_tensor_object(void*);
int aoti_torch_new_tensor_handle(void*, void**);
int aoti_torch_get_data_ptr(void*, void**);
int aoti_torch_get_sizes(void*, int64_t**);
int aoti_torch_get_strides(void*, int64_t**);
int aoti_torch_get_dim(void*, int64_t*);
int aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, void**);
int aoti_torch__reinterpret_tensor(void*, int64_t, const int64_t*, const int64_t*, int64_t, void**);
int aoti_torch_create_tensor_from_blob(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t,
                                       int32_t, void**);
bool aoti_torch_grad_mode_is_enabled();
void aoti_torch_grad_mode_set_enabled(bool);
int aoti_torch_cpu_mm_out(void*, void*, void*);
int aoti_torch_cpu_bmm_out(void*, void*, void*);
int aoti_torch_cpu_addmm_out(void*, void*, void*, void*, double, double);
int aoti_torch_cpu_baddbmm_out(void*, void*, void*, void*, double, double);
int aoti_torch_cpu_scatter_value_out(void*, void*, int64_t, void*, double);
int aoti_torch_cpu_fill__Scalar(void*, double);
int aoti_torch_cpu_mkldnn__convolution_pointwise(void*, void*, void**, const int64_t*, int64_t, const int64_t*, int64_t,
                                                 const int64_t*, int64_t, int64_t, const char*, const double**, int64_t,
                                                 const char**, void**);
int aoti_torch_cpu_mkldnn__convolution_pointwise_binary(
    void*, void*, void*, void**, const int64_t*, int64_t, const int64_t*, int64_t, const int64_t*, int64_t, int64_t,
    const char*, double*, const char**, const double**, int64_t, const char**, void**);
int aoti_torch_call_dispatcher(const char*, const char*, uint64_t*);
int torch_new_list_reserve_size(size_t, void**);
int torch_list_push_back(void*, uint64_t);
int torch_list_size(void*, size_t*);
int torch_list_get_item(void*, size_t, uint64_t*);
int torch_delete_list(void*);
__attribute__((weak)) int torch_new_stable_ivalue(uint64_t**);
__attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

void* mw_arena_take(int64_t, int64_t*);
void mw_arena_give(void*, int64_t);
void mw_gemm(int, int64_t, int64_t, int64_t, int64_t, const float*, int64_t, int64_t, int64_t, const float*, int64_t,
             int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t, int64_t, const void*);
void mw_attention(int, const int64_t*, const int64_t*, const float*, const float*, const float*, const float*, float*,
                  float*, double, int);
""" + cpu_gemm.PRODUCT + cpu_gemm.EPILOGUE + r"""
void mw_gemms(int, int64_t, int64_t, const float*, int64_t, int64_t, const Product*, int);
int mw_gemm_then(int, int64_t, int64_t, const float*, int64_t, int64_t, const Product*, const Epilogue*);
int mw_conv(int, const int64_t*, const float*, const void*, const float*, const float*, float*);
void mw_launch(void (*)(void* const*, const int64_t*, int64_t, int64_t), int, int64_t, int64_t, void* const*,
               const int64_t*);
}

// The entry runs once per call: compiling it without optimisation saves most of the compile time.
#if defined(__GNUC__) && !defined(__clang__)
#define MW_COLD __attribute__((optimize("O0")))
#else
#define MW_COLD
#endif

namespace {
typedef uint64_t Value;  // one stack slot of a dispatcher call
""" + _FRAME + r"""
void check(int code, const char* what) {
  if (code == 0) return;
  const char* why = torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  throw std::runtime_error(std::string(what) + ": " + (why ? why : "the call failed (see stderr)"));
}

struct Handle {  // owns a tensor handle
  void* h = nullptr;
  Handle() = default;
  explicit Handle(void* raw) : h(raw) {}
  Handle(Handle&& o) noexcept : h(o.h) { o.h = nullptr; }
  Handle& operator=(Handle&& o) noexcept { std::swap(h, o.h); return *this; }
  ~Handle() { reset(); }
  void reset() { if (h) aoti_torch_delete_tensor_object(h); h = nullptr; }
  void* take() { void* raw = h; h = nullptr; return raw; }
};
struct Ptr {  // an untyped address that becomes whatever pointer a kernel asks for
  void* p = nullptr;
  template <class T> operator T*() const { return (T*)p; }
};
struct Arena {
  int64_t bytes = 0;
  char* data;
  explicit Arena(int64_t want) : data((char*)mw_arena_take(want, &bytes)) { if (!data) throw std::bad_alloc(); }
  ~Arena() { mw_arena_give(data, bytes); }
  Ptr at(int64_t offset) const { return {data + offset}; }
};
struct NoGrad {
  bool before = aoti_torch_grad_mode_is_enabled();
  NoGrad() { if (before) aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { if (before) aoti_torch_grad_mode_set_enabled(true); }
};
typedef std::initializer_list<int64_t> Ints;

Ptr data_of(void* h) { void* p; check(aoti_torch_get_data_ptr(h, &p), "data_ptr"); return {p}; }
int64_t size_of(void* h, int64_t dim) { int64_t* s; check(aoti_torch_get_sizes(h, &s), "sizes"); return s[dim]; }
Ptr offset(Ptr base, int64_t bytes) { return {(char*)base.p + bytes}; }
void* empty(Ints sizes, Ints strides, int dtype) {
  void* h;
  check(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.begin(), dtype, 0, 0, &h), "allocation");
  return h;
}
void* view_of(void* base, Ints sizes, Ints strides, int64_t extra) {
  void* h;  // `extra` elements behind the base's own first element
  check(aoti_torch__reinterpret_tensor(base, sizes.size(), sizes.begin(), strides.begin(), extra, &h), "view");
  return h;
}
void* wrap(Ptr data, Ints sizes, Ints strides, int dtype) {
  void* h;
  check(aoti_torch_create_tensor_from_blob(data.p, sizes.size(), sizes.begin(), strides.begin(), 0, dtype, 0, 0, &h),
        "wrap");
  return h;
}
// relu(convolution + bias + other), weights packed for oneDNN. A template, so that it exists only where it is used.
template <class H>
void* convolve(H x, void* other, void* weight, void* bias, Ints padding, Ints stride, Ints dilation, int64_t groups,
               bool relu) {
  void* out;
  const char* attr = relu ? "relu" : "none";
  if (!other)
    check(aoti_torch_cpu_mkldnn__convolution_pointwise(
              x, weight, &bias, padding.begin(), padding.size(), stride.begin(), stride.size(), dilation.begin(),
              dilation.size(), groups, attr, nullptr, 0, nullptr, &out), "convolution");
  else
    check(aoti_torch_cpu_mkldnn__convolution_pointwise_binary(
              x, other, weight, &bias, padding.begin(), padding.size(), stride.begin(), stride.size(), dilation.begin(),
              dilation.size(), groups, "add", nullptr, relu ? &attr : nullptr, nullptr, 0, nullptr, &out),
          "convolution");
  return out;
}
// The same by the template, where `frame->convolutions` holds a weight for it. `kernel`: its height and width; `sizes`
// of the result, which like x and other is channels last.
template <class H>
void* convolution(Frame* frame, int number, H x, void* other, void* weight, void* bias, Ints kernel, Ints sizes,
                  Ints padding, Ints stride, Ints dilation, int64_t groups, bool relu) {
  if (frame->convolutions && frame->convolutions[number]) {
    int64_t* n;
    check(aoti_torch_get_sizes(x, &n), "sizes");
    const int64_t *o = sizes.begin(), *k = kernel.begin(), *s = stride.begin(), *p = padding.begin();
    const int64_t *d = dilation.begin();
    const int64_t shape[] = {n[0], n[1], n[2], n[3], o[1], o[2], o[3], k[0], k[1], s[0], s[1], p[0], p[1], d[0], d[1],
                             relu};
    Handle out(empty(sizes, {o[1] * o[2] * o[3], 1, o[1] * o[3], o[1]}, 6));
    const float* added = other ? (const float*)data_of(other) : nullptr;
    if (mw_conv(frame->threads, shape, data_of(x), frame->convolutions[number], data_of(bias), added, data_of(out.h)))
      return out.take();
  }
  return convolve(x, other, weight, bias, padding, stride, dilation, groups, relu);
}
// An operator whose arguments the C shim can't carry: `made` gets new handles (or null).
void from_python(Frame* frame, int index, std::initializer_list<void*> given, Ints sizes, void** made) {
  if (frame->python(index, (void**)given.begin(), sizes.begin(), made)) throw std::runtime_error("an operator failed");
}
void* new_reference(void* h) { void* copy; check(aoti_torch_new_tensor_handle(h, &copy), "output"); return copy; }
void unpack(Value list_value, void** items, size_t wanted) {
  void* list = (void*)list_value;
  size_t n;
  check(torch_list_size(list, &n), "list");
  if (n != wanted) throw std::runtime_error("an operator gave another number of results than planned");
  for (size_t i = 0; i < n; i++) {
    Value item;
    check(torch_list_get_item(list, i, &item), "list");
    items[i] = (void*)item;
  }
  check(torch_delete_list(list), "list");
}
// The compiler planned with these strides; an operator that answers with others must not be misread.
void expect(void* h, Ints sizes, Ints strides, const char* name) {
  int64_t dim, *have_sizes, *have_strides;
  check(aoti_torch_get_dim(h, &dim), "dim");
  check(aoti_torch_get_sizes(h, &have_sizes), "sizes");
  check(aoti_torch_get_strides(h, &have_strides), "strides");
  bool same = dim == (int64_t)sizes.size();
  bool empty = false;
  for (int64_t i = 0; same && i < dim; i++) empty |= sizes.begin()[i] == 0;
  for (int64_t i = 0; same && i < dim; i++)
    same = have_sizes[i] == sizes.begin()[i] &&
           (empty || sizes.begin()[i] == 1 || have_strides[i] == strides.begin()[i]);
  if (!same) throw std::runtime_error(std::string("result ") + name + " has other sizes or strides than planned");
}

// ---- values for the dispatcher ------------------------------------------------------------------------------------
Value v(int64_t x) { return (Value)x; }
Value v(double x) { Value out; std::memcpy(&out, &x, 8); return out; }
Value flag(bool x) { Value out = 0; std::memcpy(&out, &x, 1); return out; }
Value v32(int32_t x) { Value out = 0; std::memcpy(&out, &x, 4); return out; }
Value tensor(void* h) { void* copy; check(aoti_torch_new_tensor_handle(h, &copy), "handle"); return (Value)copy; }
Value some(Value x) {
  Value* slot = nullptr;
  if (torch_new_stable_ivalue) check(torch_new_stable_ivalue(&slot), "optional");
  else slot = new Value;
  *slot = x;
  return (Value)slot;
}
const Value none = 0;
Value list(std::initializer_list<Value> items) {
  void* out;
  check(torch_new_list_reserve_size(items.size(), &out), "list");
  for (Value item : items) check(torch_list_push_back(out, item), "list");
  return (Value)out;
}
void dispatch(const char* op, const char* overload, Value* stack) {
  check(aoti_torch_call_dispatcher(op, overload, stack), op);
}

// Rows of a kernel over all threads, or here when there is little to do.
typedef void (*Rows)(void* const* tensors, const int64_t* sizes, int64_t begin, int64_t end);
void launch(Rows rows_of, int threads, int64_t rows, int64_t work, std::initializer_list<Ptr> tensors, Ints sizes) {
  mw_launch(rows_of, threads, rows, work, (void* const*)tensors.begin(), sizes.begin());
}
void attention(int threads, Ints sizes, Ints strides, Ptr q, Ptr k, Ptr v, Ptr mask, Ptr out, Ptr lse, double scale,
               bool causal) {
  mw_attention(threads, sizes.begin(), strides.begin(), q, k, v, mask, out, lse, scale, causal);
}
int64_t floordiv(int64_t a, int64_t b) { int64_t q = a / b; return q - (a % b != 0 && (a < 0) != (b < 0)); }
int64_t mod(int64_t a, int64_t b) { int64_t r = a % b; return r + (r != 0 && (r < 0) != (b < 0) ? b : 0); }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
}  // namespace
"""
