"""The CPU matrix product: C++ source of a packed fp32 GEMM, part of the host runtime library.

`out[M, N] = a[M, K] @ b[K, N] (+ bias)`, fp32. B is packed into panels of `NR` columns (each K x NR, contiguous, zero
padded), A into tiles of `MR` rows, so that the inner kernel reads two streams and keeps MR x NR sums in registers:
6 x 64 with AVX-512, 6 x 16 with AVX2, 6 x 8 otherwise. A weight that does not change is packed once (`mw_pack_b`);
otherwise panels are packed during the product. Measured on an AVX-512 machine, one thread, [128, 768..3072]: 1.3 times
the library's own GEMM with a packed weight; about equal at 1024 rows. Where the machine has AMX, cpu_split_gemm.py adds
a second method.
"""

from . import cpu_split_conv, cpu_split_gemm

# How a program's product is done, as its frame says: `how` for mw_gemm, and whether the kernel behind it runs inside.
WAY = r"""struct Way {
  const void* how;
  int64_t inside;
};
"""

# Programs declare it too: they fill it for mw_gemm_then.
EPILOGUE_TENSORS = 16
EPILOGUE = r"""// An element-wise kernel that reads finished blocks of a product, each in the place of its first tensor.
struct Epilogue {
  void (*run)(void* const* tensors, const int64_t* sizes, int64_t begin, int64_t end);
  void* tensors[""" + str(EPILOGUE_TENSORS) + r"""];
  void apply(const float* block, int64_t step, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    Epilogue mine = *this;
    mine.tensors[0] = (void*)block;
    const int64_t sizes[] = {step, row, rows, column, columns};
    run(mine.tensors, sizes, 0, rows);
  }
};
"""

_FP32 = r"""
#if defined(__AVX512F__)
constexpr int VW = 16, NV = 4;
#elif defined(__AVX2__)
constexpr int VW = 8, NV = 2;
#else
constexpr int VW = 4, NV = 2;
#endif
constexpr int MR = 6, NR = VW * NV;
typedef float vec __attribute__((vector_size(VW * 4)));
typedef float uvec __attribute__((vector_size(VW * 4), aligned(4)));

// R rows of A (packed: k-major, R values per k) times one panel of B. `b_step` is the distance between rows of B.
template <int R>
static void micro(int64_t K, const float* __restrict a, const float* __restrict b, int64_t b_step,
                  float* __restrict c, int64_t ldc, const float* start, int64_t start_step) {
  vec sum[R][NV];
  for (int i = 0; i < R; i++)
    for (int j = 0; j < NR; j += 16) __builtin_prefetch(c + i * ldc + j, 1);
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) sum[i][j] = start ? (vec)*(const uvec*)(start + i * start_step + j * VW) : vec{};
  for (int64_t k = 0; k < K; k++) {
    vec row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) row[j] = *(const uvec*)(b + j * VW);
#pragma GCC unroll 8
    for (int j = 0; j < NR; j += 16) __builtin_prefetch(b + (VW == 16 ? 8 : 16) * b_step + j);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      vec x = a[i] - vec{};  // a broadcast: x - 0 is exact and folds away
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) sum[i][j] += x * row[j];
    }
    a += R;
    b += b_step;
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) *(uvec*)(c + i * ldc + j * VW) = sum[i][j];
}

typedef void (*Micro)(int64_t, const float*, const float*, int64_t, float*, int64_t, const float*, int64_t);
static const Micro kMicro[MR + 1] = {nullptr, micro<1>, micro<2>, micro<3>, micro<4>, micro<5>, micro<6>};

// The last panel may be narrower than NR: it goes through a small buffer.
static void micro_edge(int rows, int64_t cols, int64_t K, const float* a, const float* b, int64_t b_step, float* c,
                       int64_t ldc, const float* start, int64_t start_step) {
  alignas(64) float tile[MR * NR];
  alignas(64) float first[MR * NR];
  if (start)
    for (int i = 0; i < rows; i++)
      for (int64_t j = 0; j < NR; j++) first[i * NR + j] = j < cols ? start[i * start_step + j] : 0.0f;
  kMicro[rows](K, a, b, b_step, tile, NR, start ? first : nullptr, NR);
  for (int i = 0; i < rows; i++) std::memcpy(c + i * ldc, tile + i * NR, cols * sizeof(float));
}

// Rows [r, r + rows) of A at k0..k0+kc into `to` (k-major).
static void pack_rows(const float* a, int64_t sm, int64_t sk, int rows, int64_t kc, float* to) {
  if (rows == MR && sk == 1) {
    const float *p0 = a, *p1 = a + sm, *p2 = a + 2 * sm, *p3 = a + 3 * sm, *p4 = a + 4 * sm, *p5 = a + 5 * sm;
    for (int64_t k = 0; k < kc; k++, to += MR) {
      to[0] = p0[k]; to[1] = p1[k]; to[2] = p2[k]; to[3] = p3[k]; to[4] = p4[k]; to[5] = p5[k];
    }
    return;
  }
  for (int64_t k = 0; k < kc; k++)
    for (int i = 0; i < rows; i++) *to++ = a[i * sm + k * sk];
}

// One panel of B (K x NR, zero padded) into `to`.
static void pack_panel(const float* b, int64_t sk, int64_t sn, int64_t K, int64_t cols, float* to) {
  if (sn == 1) {
    for (int64_t k = 0; k < K; k++)
      for (int64_t j = 0; j < NR; j++) to[k * NR + j] = j < cols ? b[k * sk + j] : 0.0f;
    return;
  }
  for (int64_t k0 = 0; k0 < K; k0 += 16) {  // a transposition, in blocks that stay in L1
    int64_t k1 = std::min(K, k0 + 16);
    for (int64_t j = 0; j < NR; j++)
      for (int64_t k = k0; k < k1; k++) to[k * NR + j] = j < cols ? b[k * sk + j * sn] : 0.0f;
  }
}

static int64_t block_k() { return VW == 16 ? 768 : 384; }
static int64_t block_m() {  // rows whose packed tiles take half of the second-level cache
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t l2 = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 256 * 1024);
#else
  static const int64_t l2 = 512 * 1024;
#endif
  return std::min<int64_t>(192, l2 / 2 / (block_k() * 4));
}

struct Scratch {  // one growing buffer per thread and use; freed with the thread
  float* data = nullptr;
  int64_t size = 0;
  float* get(int64_t n) {
    if (n > size) {
      std::free(data);
      size = 0;  // should the next line fail
      data = (float*)std::aligned_alloc(64, (n * 4 + 63) / 64 * 64);
      if (!data) throw std::bad_alloc();
      size = n;
    }
    return data;
  }
  ~Scratch() { std::free(data); }
};
static thread_local Scratch scratch_a, scratch_b, scratch_c;

// `panel(p, k0, kc)` gives the panel's values from row k0 on; its rows are `b_step` apart.
struct PackedB {
  const float* data;
  int64_t K;
  const float* panel(int64_t p, int64_t k0, int64_t) const { return data + (p * K + k0) * NR; }
};
struct StridedB {  // packed while we go, one panel and k block at a time
  const float* data;
  int64_t sk, sn, N;
  const float* panel(int64_t p, int64_t k0, int64_t kc) const {
    float* to = scratch_b.get(kc * NR);
    pack_panel(data + k0 * sk + p * NR * sn, sk, sn, kc, std::min<int64_t>(NR, N - p * NR), to);
    return to;
  }
};

template <class B>
static void gemm_block(int64_t m0, int64_t m1, int64_t p0, int64_t p1, int64_t N, int64_t K, const float* a, int64_t sm,
                       int64_t sk, const B& b, const float* bias, int64_t bias_m, float* c, int64_t ldc,
                       const Epilogue* epilogue) {
  alignas(64) float block[MR * NR];  // what an epilogue reads, where there is one
  const int64_t KC = block_k();
  // Row blocks of equal height near block_m(): a few rows left over would stream all of B once more.
  const int64_t blocks = std::max<int64_t>(1, (m1 - m0 + block_m() / 2) / block_m());
  const int64_t MC = ((m1 - m0 + blocks - 1) / blocks + MR - 1) / MR * MR;
  float* tiles = scratch_a.get(std::min(K, KC) * (MC + MR));
  for (int64_t m = m0; m < m1; m += MC) {
    int64_t rows_here = std::min(MC, m1 - m);
    for (int64_t k0 = 0; k0 < K; k0 += KC) {
      int64_t kc = std::min(KC, K - k0);
      const bool finish = epilogue && k0 + kc == K;
      for (int64_t r = 0; r < rows_here; r += MR)
        pack_rows(a + (m + r) * sm + k0 * sk, sm, sk, (int)std::min<int64_t>(MR, rows_here - r), kc, tiles + r * kc);
      for (int64_t p = p0; p < p1; p++) {
        const float* panel = b.panel(p, k0, kc);
        int64_t cols = std::min<int64_t>(NR, N - p * NR);
        for (int64_t r = 0; r < rows_here; r += MR) {
          int rows = (int)std::min<int64_t>(MR, rows_here - r);
          float* sums = c + (m + r) * ldc + p * NR;
          const float* start = k0 ? sums : bias ? bias + (m + r) * bias_m + p * NR : nullptr;
          int64_t step = k0 ? ldc : bias_m, to_step = finish ? NR : ldc;
          float* to = finish ? block : sums;
          if (cols == NR) kMicro[rows](kc, tiles + r * kc, panel, NR, to, to_step, start, step);
          else micro_edge(rows, cols, kc, tiles + r * kc, panel, NR, to, to_step, start, step);
          if (finish) epilogue->apply(block, NR, m + r, rows, p * NR, cols);
        }
      }
    }
  }
}

// What ran out of memory in a parallel region, where an exception would end the process, is thrown behind it.
struct OutOfMemory {
  std::atomic<bool> seen{false};
  template <class F>
  void watch(F body) {
    try {
      body();
    } catch (const std::bad_alloc&) {
      seen = true;
    }
  }
  void raise() const {
    if (seen) throw std::bad_alloc();
  }
};

// `run(m0, m1, p0, p1)` on a grid of row blocks (whole tiles of `height` rows) and panel blocks, one per thread.
// Rows are split when there are enough of them: A is then packed once.
template <class F>
static void over_grid(int threads, int64_t M, int64_t panels, int64_t work, int64_t height, F run) {
  if (threads <= 1 || work < 64 * 1024) return run(0, M, 0, panels);
  int row_parts = 1;
  while (row_parts * 2 <= threads && threads % (row_parts * 2) == 0 && M / (row_parts * 2) >= 192) row_parts *= 2;
  int panel_parts = threads / row_parts;
  OutOfMemory memory;
#pragma omp parallel num_threads(threads)
  {
    int64_t tiles = (M + height - 1) / height;
    for (int part = omp_get_thread_num(); part < row_parts * panel_parts; part += omp_get_num_threads()) {
      int64_t i = part / panel_parts, j = part % panel_parts;
      int64_t m0 = std::min(M, tiles * i / row_parts * height), m1 = std::min(M, tiles * (i + 1) / row_parts * height);
      int64_t p0 = panels * j / panel_parts, p1 = panels * (j + 1) / panel_parts;
      if (m0 < m1 && p0 < p1) memory.watch([&] { run(m0, m1, p0, p1); });
    }
  }
  memory.raise();
}

template <class B>
static void gemm_threads(int threads, int64_t M, int64_t N, int64_t K, const float* a, int64_t sm, int64_t sk,
                         const B& b, const float* bias, int64_t bias_m, float* c, int64_t ldc,
                         const Epilogue* epilogue = nullptr) {
  if (K == 0) {
    for (int64_t m = 0; m < M; m++)
      for (int64_t n = 0; n < N; n++) c[m * ldc + n] = bias ? bias[m * bias_m + n] : 0.0f;
    return;
  }
  over_grid(threads, M, (N + NR - 1) / NR, M * N * K, MR, [&](int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
    gemm_block(m0, m1, p0, p1, N, K, a, sm, sk, b, bias, bias_m, c, ldc, epilogue);
  });
}

typedef void (*Sgemm)(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                      const int*, const float*, const int*, const float*, float*, const int*);
static Sgemm library_sgemm() {
  static Sgemm found = (Sgemm)dlsym(RTLD_DEFAULT, "sgemm_");
  return found;
}

// One product on strided operands: the library's GEMM where it can express the strides, else panels packed on the fly
static void gemm_one(int threads, int64_t M, int64_t N, int64_t K, const float* a, int64_t sm, int64_t sk,
                     const float* b, int64_t sbk, int64_t sbn, const float* bias, int64_t bias_m, float* c,
                     int64_t ldc) {
  Sgemm sgemm = library_sgemm();
  bool a_ok = sk == 1 || sm == 1, b_ok = sbn == 1 || sbk == 1;
  int64_t lda = sk == 1 ? sm : sk, ldb = sbn == 1 ? sbk : sbn;
  a_ok = a_ok && lda >= (sk == 1 ? K : M) && lda > 0;
  b_ok = b_ok && ldb >= (sbn == 1 ? N : K) && ldb > 0;
  if (!sgemm || !a_ok || !b_ok || M <= 0 || N <= 0 || K <= 0 || ldc < N) {
    gemm_threads(threads, M, N, K, a, sm, sk, StridedB{b, sbk, sbn, N}, bias, bias_m, c, ldc);
    return;
  }
  if (bias)
    for (int64_t m = 0; m < M; m++) std::memcpy(c + m * ldc, bias + m * bias_m, N * sizeof(float));
  float one = 1.0f, beta = bias ? 1.0f : 0.0f;  // column-major: C^T = B^T A^T
  int m = (int)N, n = (int)M, k = (int)K, la = (int)ldb, lb = (int)lda, lc = (int)ldc;
  sgemm(sbn == 1 ? "N" : "T", sk == 1 ? "N" : "T", &m, &n, &k, &one, b, &la, a, &lb, &beta, c, &lc);
}
"""

# How a product is done: by the library (a null `how`), with a packed copy of B (its address; `method` says of which
# kind), or split on the way (kSplitNow, for a B that is no weight).
LIBRARY, FP32, SPLIT = 0, 1, 2
SPLIT_NOW = 1  # an address that is no memory
_ENTRY = r"""
struct PackedHeader {  // 64 bytes before the packed values
  int64_t method;
  uint32_t largest, smallest;
};
constexpr int64_t kHeader = 64;
constexpr int64_t kFp32 = 1, kSplit = 2;
static const void* const kSplitNow = (const void*)1;

// Bytes of a packed copy of B (K x N).
extern "C" MW_EXPORT int64_t mw_packed_bytes(int64_t method, int64_t K, int64_t N) {
  if (method == kSplit) return kHeader + (N + 31) / 32 * ((K + 31) / 32) * 32 * 32 * 6;
  return kHeader + (N + NR - 1) / NR * NR * K * 4;
}

// Drop memory from every cache: a weight that is timed comes from as far away as it does in a model.
extern "C" MW_EXPORT void mw_evict(const char* data, int64_t bytes) {
#if defined(__x86_64__)
  for (int64_t i = 0; i < bytes; i += 64) __builtin_ia32_clflush(data + i);
  __builtin_ia32_mfence();
#endif
}

// Columns of B (K x N, element strides) as panels; `to` is aligned to 64 bytes. `alone`: by the calling thread. 0:
// `method` is not for such strides.
const int64_t kAlone = 1 << 18;  // smaller matrices are packed by one thread
extern "C" MW_EXPORT int mw_pack_b(int64_t method, const float* b, int64_t sk, int64_t sn, int64_t K, int64_t N,
                                   char* to, int alone) {
  PackedHeader header{method, 0, 0};
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t huge = 1 << 21, bytes = mw_packed_bytes(method, K, N);
  if ((int64_t)to % huge == 0) madvise(to, bytes / huge * huge, MADV_HUGEPAGE);
#endif
  if (method == kSplit) {
#if defined(MW_SPLIT)
    if (!mw_split_ready() || !split_strides(1, 1, sk, sn)) return 0;
    Range range;
#pragma omp parallel if (!alone && K * N > kAlone)
    {
      Range mine;
#pragma omp for
      for (int64_t p = 0; p < (N + SC - 1) / SC; p++)
        pack_split_panel(b + p * SC * sn, sk, sn, K, std::min<int64_t>(SC, N - p * SC),
                         (bf16*)(to + kHeader) + p * ((K + SK - 1) / SK) * B_STEP, mine);
#pragma omp critical
      range.add(mine);
    }
    header.largest = range.largest, header.smallest = range.smallest;
#else
    return 0;
#endif
  } else {
#pragma omp parallel for if (!alone && K * N > kAlone)
    for (int64_t p = 0; p < (N + NR - 1) / NR; p++)
      pack_panel(b + p * NR * sn, sk, sn, K, std::min<int64_t>(NR, N - p * NR), (float*)(to + kHeader) + p * NR * K);
  }
  std::memcpy(to, &header, sizeof header);
  return 1;
}

"""

# Programs declare it too: they fill it for mw_gemms.
PRODUCT = r"""struct Product {  // one of several products with the same left side
  int64_t N;
  const float* b;
  int64_t sbk, sbn;
  const float* bias;
  int64_t bias_m;
  float* c;
  int64_t ldc;
  const void* how;
};
"""

_METHODS = r"""static int64_t method_of(const void* how) {
  if (how == kSplitNow || !how) return 0;
  PackedHeader header;
  std::memcpy(&header, how, sizeof header);
  return header.method;
}
// True when the products were done: all of them have split copies (or the one there is is to be split now).
static bool split_as_asked(int threads, int64_t M, int64_t K, const float* a, int64_t sm, int64_t sk,
                           const Product* products, int n, const Epilogue* epilogue = nullptr) {
#if defined(MW_SPLIT)
  if (M <= 0 || K <= 0 || !(sm == 1 || sk == 1) || !mw_split_ready()) return false;
  if (n == 1 && products->how == kSplitNow) {
    const Product& p = *products;
    if (p.N <= 0 || !split_strides(sm, sk, p.sbk, p.sbn)) return false;
    return split_products<UnsplitB>(
        threads, M, K, a, sm, sk,
        {{{p.b, p.sbk, p.sbn, p.N, nullptr, {}}, p.N, 0, p.bias, p.bias_m, p.c, p.ldc, epilogue}});
  }
  std::vector<Side<SplitB>> sides;
  int64_t panels = 0;
  for (int i = 0; i < n; i++) {
    const Product& p = products[i];
    if (p.N <= 0 || method_of(p.how) != kSplit) return false;
    PackedHeader header;
    std::memcpy(&header, p.how, sizeof header);
    const bf16* values = (const bf16*)((const char*)p.how + kHeader);
    const Range range{header.largest, header.smallest};
    if (!range.usable()) return false;
    sides.push_back({{values, K, range}, p.N, panels, p.bias, p.bias_m, p.c, p.ldc, epilogue});
    panels += (p.N + SC - 1) / SC;
  }
  return split_products(threads, M, K, a, sm, sk, sides);
#else
  return false;
#endif
}
// True when the epilogue was applied. Otherwise c holds the product: there is none, or the library was asked, or values
// left the range of the method.
static bool one_product(int threads, int64_t M, int64_t K, const float* a, int64_t sm, int64_t sk, const Product& p,
                        const Epilogue* epilogue) {
  if (p.how && split_as_asked(threads, M, K, a, sm, sk, &p, 1, epilogue)) return epilogue;
  if (method_of(p.how) == kFp32) {
    const PackedB packed{(const float*)((const char*)p.how + kHeader), K};
    if (K == 0) epilogue = nullptr;
    gemm_threads(threads, M, p.N, K, a, sm, sk, packed, p.bias, p.bias_m, p.c, p.ldc, epilogue);
    return epilogue;
  }
  gemm_one(threads, M, p.N, K, a, sm, sk, p.b, p.sbk, p.sbn, p.bias, p.bias_m, p.c, p.ldc);
  return false;
}

// out[batch, M, N] = a[batch, M, K] @ b[batch, K, N] (+ bias), element strides. `how` only with a batch of 1.
extern "C" MW_EXPORT void mw_gemm(int threads, int64_t batch, int64_t M, int64_t N, int64_t K, const float* a,
                                  int64_t sab, int64_t sm, int64_t sk, const float* b, int64_t sbb, int64_t sbk,
                                  int64_t sbn, const float* bias, int64_t bias_b, int64_t bias_m, float* c,
                                  int64_t scb, int64_t ldc, const void* how) {
  if (batch == 1) {
    one_product(threads, M, K, a, sm, sk, {N, b, sbk, sbn, bias, bias_m, c, ldc, how}, nullptr);
    return;
  }
  OutOfMemory memory;
#pragma omp parallel for num_threads(threads) if (threads > 1 && batch * M * N * K > 64 * 1024)
  for (int64_t i = 0; i < batch; i++)
    memory.watch([&] {
      gemm_one(1, M, N, K, a + i * sab, sm, sk, b + i * sbb, sbk, sbn, bias ? bias + i * bias_b : nullptr, bias_m,
               c + i * scb, ldc);
    });
  memory.raise();
}

// One product with an element-wise kernel behind it, which writes none of the product's operands. 1: what the kernel
// writes is done, and what c holds is unspecified; 0: only the product is done.
extern "C" MW_EXPORT int mw_gemm_then(int threads, int64_t M, int64_t K, const float* a, int64_t sm, int64_t sk,
                                      const Product* product, const Epilogue* epilogue) {
  return one_product(threads, M, K, a, sm, sk, *product, epilogue);
}

// Several products with the same a [M, K]: where all are split, a is split once for all of them.
extern "C" MW_EXPORT void mw_gemms(int threads, int64_t M, int64_t K, const float* a, int64_t sm, int64_t sk,
                                   const Product* products, int n) {
  if (split_as_asked(threads, M, K, a, sm, sk, products, n)) return;
  for (const Product* p = products; p < products + n; p++)
    mw_gemm(threads, 1, M, p->N, K, a, 0, sm, sk, p->b, 0, p->sbk, p->sbn, p->bias, 0, p->bias_m, p->c, 0, p->ldc,
            p->how);
}
"""

SOURCE = EPILOGUE + _FP32 + cpu_split_gemm.SOURCE + _ENTRY + PRODUCT + _METHODS + cpu_split_conv.SOURCE
