"""The CPU matrix product on AMX: fp32 in, fp32 out, through tiles that multiply bf16.

Every fp32 number is the exact sum of three bf16 numbers, x = x1 + x2 + x3, each the rounding of what the ones before it
leave. Of the nine products of two such sums six are kept; the three that are dropped lie below 2^-24 of the result. The
five small ones are summed first, from zero, so that they meet the large one only once per block: the error against
float64 is about half of a sequential fp32 sum's. Method: Henry, Tang, Heinecke, "Leveraging the bfloat16 artificial
intelligence datatype for higher-precision computations" (ARITH 2019). Six tile products cost 6/16 of the fp32
instructions they replace.

What the method can't do is told from the values: bf16 tiles treat subnormal numbers as zero, and inf - inf is no
number. A product whose rows or columns leave [2^-100, 2^120], or whose scale leaves [2^-96, 2^100], is done by the
library.
"""

SOURCE = r"""
// Compiled for AVX-512 hosts; whether this machine has the tiles is asked at run time (mw_split_ready).
#if defined(__AVX512F__) && defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || defined(__clang__))
#define MW_SPLIT 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#define MW_TILES __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq")))

typedef uint16_t bf16;
constexpr int SR = 16, SC = 32, SK = 32;       // a tile: 16 rows of 32 k; a panel of B: 32 columns, two tiles wide
constexpr int64_t TILE = SR * SK;              // elements of one tile
constexpr int64_t A_STEP = 3 * TILE;           // three parts of one 16 x 32 piece of A
constexpr int64_t B_STEP = 6 * TILE;           // three parts of one 32 x 32 piece of B
constexpr int64_t L1_STEPS = 3;                // k steps whose tiles of A and B fit into the first-level cache

static bool tiles_allowed() {
  unsigned a = 0, b = 0, c = 0, d = 0, a1 = 0, ignored = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !__get_cpuid_count(7, 1, &a1, &ignored, &ignored, &ignored))
    return false;
  bool tiles = (d >> 24 & 1) && (d >> 22 & 1), converts = a1 >> 5 & 1;
  return tiles && converts && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

static MW_TILES void configure_tiles() {
  struct __attribute__((packed)) { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } c = {};
  c.palette = 1;
  for (int i = 0; i < 8; i++) c.bytes[i] = 64, c.rows[i] = 16;
  _tile_loadconfig(&c);
}

struct Tiles {  // released also when memory runs out: threads with tiles in use are slow to switch
  MW_TILES Tiles() { configure_tiles(); }
  MW_TILES ~Tiles() { _tile_release(); }
};

// Largest and smallest maximum of the rows (columns) seen, as bits of |x|: these order like the numbers.
struct Range {
  uint32_t largest = 0, smallest = 0x7f800000;
  void add(uint32_t top) {
    largest = std::max(largest, top);
    if (top) smallest = std::min(smallest, top);
  }
  void add(const Range& other) {
    largest = std::max(largest, other.largest);
    smallest = std::min(smallest, other.smallest);
  }
  bool usable() const { return largest >> 23 < 247 && smallest >> 23 > 27; }  // exponents are biased by 127
};
static bool splits(const Range& a, const Range& b) {
  int la = a.largest >> 23, lb = b.largest >> 23, sa = a.smallest >> 23, sb = b.smallest >> 23;
  return a.usable() && b.usable() && la + lb < 254 + 100 && sa + sb > 254 - 96;
}

// 32 numbers into three vectors of 32 bf16 parts, in order.
static inline MW_TILES void split(__m512 low, __m512 high, __m512i* out) {
  for (int s = 0;; s++) {
    out[s] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (s == 2) return;
    __m256i l = _mm512_castsi512_si256(out[s]), h = _mm512_extracti64x4_epi64(out[s], 1);
    low = _mm512_sub_ps(low, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(l), 16));
    high = _mm512_sub_ps(high, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
}
static inline MW_TILES __m512i larger(__m512i top, __m512 x) {
  return _mm512_max_epu32(top, _mm512_and_si512((__m512i)x, _mm512_set1_epi32(0x7fffffff)));
}
static inline __mmask16 lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// A piece whose 32 k are contiguous: `rows` lines, `step` apart. top[i]: largest |x| of line i so far.
static MW_TILES void lines_of_k(const float* p, int64_t step, int64_t rows, int64_t ks, __m512i (*out)[SR],
                                __m512i* top) {
  for (int i = 0; i < SR; i++) {
    __m512i parts[3] = {};
    if (i < rows) {
      __m512 low = _mm512_maskz_loadu_ps(lanes(ks), p + i * step);
      __m512 high = _mm512_maskz_loadu_ps(lanes(ks - 16), p + i * step + 16);
      top[i] = larger(larger(top[i], low), high);
      split(low, high, parts);
    }
    for (int s = 0; s < 3; s++) out[s][i] = parts[s];
  }
}
// A piece whose k are `step` apart: 16 lines side by side, pairs of k in one 32-bit word. top[0]: lane per line.
static MW_TILES void pairs_of_k(const float* p, int64_t step, int64_t rows, int64_t ks, __m512i (*out)[SR],
                                __m512i* top) {
  alignas(64) static const uint16_t kZip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i zip = _mm512_load_si512(kZip);
  for (int i = 0; i < SR; i++) {
    __builtin_prefetch(p + (2 * i + SK) * step);  // lines of the next piece lie too far apart for the hardware
    __builtin_prefetch(p + (2 * i + 1 + SK) * step);
    __m512 even = _mm512_maskz_loadu_ps(2 * i < ks ? lanes(rows) : 0, p + 2 * i * step);
    __m512 odd = _mm512_maskz_loadu_ps(2 * i + 1 < ks ? lanes(rows) : 0, p + (2 * i + 1) * step);
    __m512i parts[3];
    top[0] = larger(larger(top[0], even), odd);
    split(even, odd, parts);
    for (int s = 0; s < 3; s++) out[s][i] = _mm512_permutexvar_epi16(zip, parts[s]);
  }
}
static inline MW_TILES void transpose(__m512i* r) {  // 16 x 16 words
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// 16 lines x K into consecutive pieces, `gap` elements from one to the next and `part` from one part to the next.
// `by_line`: rows of a tile are lines (A); otherwise they are pairs of k (B).
static MW_TILES void pack_lines(const float* p, int64_t line, int64_t k_step, int64_t rows, int64_t K, bool by_line,
                                bf16* to, int64_t gap, int64_t part, Range& range) {
  __m512i piece[3][SR], top[SR];
  for (int i = 0; i < SR; i++) top[i] = _mm512_setzero_si512();
  const bool contiguous = k_step == 1;
  for (int64_t k = 0; k < K; k += SK, to += gap) {
    if (contiguous) lines_of_k(p + k, line, rows, K - k, piece, top);
    else pairs_of_k(p + k * k_step, k_step, rows, K - k, piece, top);
    for (int s = 0; s < 3; s++) {
      if (contiguous != by_line) transpose(piece[s]);
      for (int i = 0; i < SR; i++) _mm512_store_si512(to + s * part + i * SK, piece[s][i]);
    }
  }
  if (contiguous) {
    for (int i = 0; i < rows; i++) range.add(_mm512_reduce_max_epu32(top[i]));
  } else {
    alignas(64) uint32_t tops[16];
    _mm512_store_si512(tops, top[0]);
    for (int i = 0; i < rows; i++) range.add(tops[i]);
  }
}
// One panel of B (32 columns), K rows.
static void pack_split_panel(const float* b, int64_t sk, int64_t sn, int64_t K, int64_t cols, bf16* to, Range& range) {
  for (int64_t j = 0; j < 2; j++)
    pack_lines(b + j * 16 * sn, sn, sk, std::max<int64_t>(0, std::min<int64_t>(16, cols - j * 16)), K, false,
               to + j * TILE, B_STEP, 2 * TILE, range);
}

// 32 (or 16) x 32 of the product over `steps` k steps, from zero, into `out`. Prefetches `lines` cache lines of `next`
// between any two groups of tile products: in one burst they would take every fill buffer from the loads of A.
// Step k of A lies at[k] elements behind a0 and a1, its parts `part` elements apart.
template <int TILES>
static inline MW_TILES void multiply(int64_t steps, const bf16* a0, const bf16* a1, const int64_t* at, int64_t part,
                                     const bf16* b, float* out, const char* next, int lines) {
#define MW_A(i) _tile_loadd(4, x + (i) * part, 64); if (TILES == 2) _tile_loadd(5, y + (i) * part, 64);
#define MW_B(i) _tile_loadd(6, z + 2 * (i) * TILE, 64); _tile_loadd(7, z + (2 * (i) + 1) * TILE, 64);
#define MW_PRODUCTS \
  for (int q = 0; q < lines; q++, next += 64) _mm_prefetch(next, _MM_HINT_T1); \
  _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); \
  if (TILES == 2) { _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7); }
  _tile_zero(0); _tile_zero(1);
  if (TILES == 2) { _tile_zero(2); _tile_zero(3); }
  for (int64_t k = 0; k < steps; k++) {  // a3 b1, a2 b1, a2 b2, a1 b2, a1 b3
    const bf16 *x = a0 + at[k], *y = a1 + at[k], *z = b + k * B_STEP;
    MW_B(0) MW_A(2) MW_PRODUCTS
    MW_A(1) MW_PRODUCTS
    MW_B(1) MW_PRODUCTS
    MW_A(0) MW_PRODUCTS
    MW_B(2) MW_PRODUCTS
  }
  for (int64_t k = 0; k < steps; k++) {  // a1 b1
    const bf16 *x = a0 + at[k], *y = a1 + at[k], *z = b + k * B_STEP;
    MW_B(0) MW_A(0) MW_PRODUCTS
  }
  _tile_stored(0, out, 4 * SC); _tile_stored(1, out + 16, 4 * SC);
  if (TILES == 2) { _tile_stored(2, out + 16 * SC, 4 * SC); _tile_stored(3, out + 16 * SC + 16, 4 * SC); }
#undef MW_A
#undef MW_B
#undef MW_PRODUCTS
}

// c = tile + start, where start is a bias or what c holds already.
static inline MW_TILES void put(const float* tile, int64_t rows, int64_t cols, float* c, int64_t ldc,
                                const float* start, int64_t start_step) {
  const __mmask16 left = lanes(cols), right = lanes(cols - 16);
  for (int64_t i = 0; i < rows; i++, tile += SC, c += ldc, start += start_step) {
    __m512 l = _mm512_load_ps(tile), r = _mm512_load_ps(tile + 16);
    if (start) {
      l = _mm512_add_ps(l, _mm512_maskz_loadu_ps(left, start));
      r = _mm512_add_ps(r, _mm512_maskz_loadu_ps(right, start + 16));
    }
    _mm512_mask_storeu_ps(c, left, l);
    _mm512_mask_storeu_ps(c + 16, right, r);
  }
}

// Where the pieces of panels g0..g1 from row k0 on come from: a packed copy, or B itself, packed on the way.
struct SplitB {
  const bf16* data;
  int64_t K;
  Range range;
  static constexpr bool streams = true;  // from memory: worth prefetching
  const bf16* pieces(int64_t p, int64_t, int64_t k0, int64_t, Range& seen) const {
    seen = range;
    return data + (p * ((K + SK - 1) / SK) + k0 / SK) * B_STEP;
  }
  void pack(int64_t, int64_t, int64_t, int64_t) {}
};
struct UnsplitB {
  const float* data;
  int64_t sk, sn, N;
  const bf16* packed = nullptr;
  Range range;
  static constexpr bool streams = false;
  const bf16* pieces(int64_t p, int64_t g0, int64_t, int64_t steps, Range& seen) const {
    seen = range;
    return packed + (p - g0) * steps * B_STEP;
  }
  void pack(int64_t g0, int64_t g1, int64_t k0, int64_t kc) {
    const int64_t steps = (kc + SK - 1) / SK;
    bf16* to = (bf16*)scratch_b.get((g1 - g0) * steps * B_STEP / 2);
    packed = to;
    range = Range();
    for (int64_t p = g0; p < g1; p++, to += steps * B_STEP)
      pack_split_panel(data + k0 * sk + p * SC * sn, sk, sn, kc, std::min<int64_t>(SC, N - p * SC), to, range);
  }
};

// One of several products with the same left side. Their panels are numbered through; `first` is this one's first.
template <class B>
struct Side {
  B b;
  int64_t N, first;
  const float* bias;
  int64_t bias_m;
  float* c;
  int64_t ldc;
  const Epilogue* epilogue = nullptr;
};

// Rows m0..m1 of panels p0..p1, in blocks of rows and k that are split at once and stay in L2 beside a panel of B.
template <class B>
struct SplitBlock {
  int64_t m0, m1, p0, p1, K;
  const float* a;
  int64_t sm, sk;
  std::vector<Side<B>> sides;  // its own: UnsplitB packs into it
  // Measured; B that is packed on the way wants shorter k.
  static constexpr int64_t KC = B::streams ? 768 : 384, HEIGHT = B::streams ? 192 : 256;
  static constexpr int64_t GROUP = 32;  // panels of B packed at once, where several blocks of rows read them

  // False when the values leave the range of the method: the results are then unfinished.
  MW_TILES bool run() {
    const int64_t blocks = std::max<int64_t>(1, (m1 - m0 + 127) / HEIGHT);
    const int64_t MC = ((m1 - m0 + blocks - 1) / blocks + SC - 1) / SC * SC;
    const Tiles configured;
    if (B::streams) {
      for (int64_t m = m0; m < m1; m += MC)
        for (int64_t k0 = 0; k0 < K; k0 += KC)
          if (!part(m, std::min(MC, m1 - m), k0, p0, p1)) return false;
      return true;
    }
    const int64_t group = blocks == 1 ? 1 : GROUP, wide = blocks == 1 ? p1 - p0 : group;
    for (int64_t w = p0; w < p1; w += wide)  // one block of rows: its pieces serve all panels; several: B's serve them
      for (int64_t k0 = 0; k0 < K; k0 += KC)
        for (int64_t g0 = w; g0 < std::min(p1, w + wide); g0 += group) {
          const int64_t g1 = std::min(p1, g0 + group);
          sides[0].b.pack(g0, g1, k0, std::min(KC, K - k0));
          for (int64_t m = m0; m < m1; m += MC)
            if (!part(m, std::min(MC, m1 - m), k0, g0, g1)) return false;
        }
    return true;
  }

  MW_TILES bool part(int64_t m, int64_t rows, int64_t k0, int64_t g0, int64_t g1) {
    static const int64_t kNext[L1_STEPS] = {0, A_STEP, 2 * A_STEP};
    alignas(64) float tile[32 * SC];
    const int64_t kc = std::min(KC, K - k0), steps = (kc + SK - 1) / SK;
    const int64_t tiles = (rows + SR - 1) / SR, pairs = (tiles + 1) / 2;
    const bf16* pieces = rows_split(m, rows, k0, kc);
    size_t at = 0;
    for (int64_t p = g0; p < g1; p++) {
      while (at + 1 < sides.size() && sides[at + 1].first <= p) at++;
      const Side<B>& side = sides[at];
      const int64_t column = (p - side.first) * SC, cols = std::min<int64_t>(SC, side.N - column);
      Range theirs;
      const bf16* panel = side.b.pieces(p - side.first, g0 - side.first, k0, steps, theirs);
      if (!splits(mine, theirs)) return false;
      // Sums stand in c; with an epilogue, those of the last k stand side by side, and their finished tiles go to it.
      const bool finish = side.epilogue && k0 + kc == K;
      const int64_t step = finish ? SC : side.ldc;
      float* const held = side.c + m * side.ldc + column;
      float* const sums = finish ? scratch_c.get((rows + SC) * SC) : held;
      for (int64_t s = 0; s < steps; s += L1_STEPS) {
        const int64_t n = std::min(L1_STEPS, steps - s);
        const bf16* z = panel + s * B_STEP;
        const int lines = B::streams ? (int)((16 + pairs - 1) / pairs) : 0;  // per group: 96 lines of B a k step
        for (int64_t t = 0; t < tiles; t += 2) {
          const bf16* x = pieces + (t * steps + s) * A_STEP;
          const char* next = (const char*)(z + n * B_STEP) + t / 2 * n * 6 * lines * 64;
          if (t + 1 < tiles) multiply<2>(n, x, x + steps * A_STEP, kNext, TILE, z, tile, next, lines);
          else multiply<1>(n, x, x, kNext, TILE, z, tile, next, lines);
          const int64_t row = t * SR, here = std::min<int64_t>(2 * SR, rows - row);
          const float* start = s ? sums + row * step : k0 ? held + row * side.ldc : nullptr;
          if (!start && side.bias) start = side.bias + (m + row) * side.bias_m + column;
          put(tile, here, cols, sums + row * step, step, start, s ? step : k0 ? side.ldc : side.bias_m);
          if (finish && s + n == steps) side.epilogue->apply(sums + row * step, step, m + row, here, column, cols);
        }
      }
    }
    return true;
  }

  // Rows m..m+rows of A at k0..k0+kc as tiles; `mine`: their range.
  MW_TILES const bf16* rows_split(int64_t m, int64_t rows, int64_t k0, int64_t kc) {
    const int64_t tiles = (rows + SR - 1) / SR, steps = (kc + SK - 1) / SK;
    bf16* pieces = (bf16*)scratch_a.get(tiles * steps * A_STEP / 2);
    if (m == kept_m && k0 == kept_k) return pieces;  // the only block of rows: split for the panels before
    mine = Range();
    for (int64_t t = 0; t < tiles; t++)
      pack_lines(a + (m + t * SR) * sm + k0 * sk, sm, sk, std::min<int64_t>(SR, rows - t * SR), kc, true,
                 pieces + t * steps * A_STEP, A_STEP, TILE, mine);
    kept_m = m, kept_k = k0;
    return pieces;
  }
  Range mine;
  int64_t kept_m = -1, kept_k = -1;
};

template <class B>
static bool split_products(int threads, int64_t M, int64_t K, const float* a, int64_t sm, int64_t sk,
                           const std::vector<Side<B>>& sides) {
  std::atomic<bool> fits{true};
  const int64_t panels = sides.back().first + (sides.back().N + SC - 1) / SC;
  over_grid(threads, M, panels, M * panels * SC * K, SR, [&](int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
    SplitBlock<B> block{m0, m1, p0, p1, K, a, sm, sk, sides, {}};
    if (!block.run()) fits = false;
  });
  return fits;
}
static bool split_strides(int64_t sm, int64_t sk, int64_t sbk, int64_t sbn) {
  return (sm == 1 || sk == 1) && (sbk == 1 || sbn == 1);
}
#endif

extern "C" MW_EXPORT int mw_split_ready() {
#if defined(MW_SPLIT)
  static const bool ready = tiles_allowed();
  return ready;
#else
  return 0;
#endif
}
"""
