"""The CPU attention: C++ source of fp32 scaled dot product attention, part of the host runtime library.

`out = softmax(scale * q k^T + mask) v` per batch and head, with the meaning of ATen's flash attention for the CPU. One
task is a block of LANES query rows (64 with AVX-512). Queries are lanes: scores are kept as [key][query], so that K is
read where it lies, maximum and sum of the softmax are vertical, and the probabilities are already packed for the second
product, which reads rows of V. Only the block's queries are transposed. Keys come in blocks whose scores stay in the
first two cache levels, with the running maximum and sum of Milakov & Gimelshein (arXiv:1805.02867); keys that causality
or a mask of -inf hides from all queries at hand are skipped, to a vector's width. Scores are summed in spans of the
head, which keeps their rounding errors at those of a product that sums across lanes.
Measured on an AVX-512 machine against ATen's operator, 12 heads of 64, fp32, 1 / 2 threads: [1, 128] 1.3 / 1.6 times as
fast, causal 2.1 / 2.3, [1, 197] 1.3 / 1.5, [1, 1024] 1.15 / 1.15, causal 1.6 / 1.6.
"""

SOURCE = r"""
namespace attention {
#if defined(__AVX512F__)
constexpr int VW = 16, NV = 4;
#elif defined(__AVX2__)
constexpr int VW = 8, NV = 2;
#else
constexpr int VW = 4, NV = 2;
#endif
constexpr int LANES = VW * NV;  // queries of one block
constexpr int TILE = 6;         // keys (first product) or queries (second product) whose sums are kept in registers
constexpr int64_t KEYS = 128;   // keys of one block
constexpr int64_t SPAN = 64;    // products added up in one go: rounding errors grow with the length of a sum
constexpr float LOWEST = -__builtin_inff();
typedef float vec __attribute__((vector_size(VW * 4)));
typedef float uvec __attribute__((vector_size(VW * 4), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(VW * 4)));
typedef uint32_t bits __attribute__((vector_size(VW * 4)));

static inline vec all(float x) { return x - vec{}; }  // exact, and folds into a broadcast
static inline vec load(const float* p) { return (vec)*(const uvec*)p; }
static inline void store(float* p, vec x) { *(uvec*)p = x; }
static inline vec larger(vec a, vec b) { return a > b ? a : b; }

// exp(x) for x <= 0, within 2 ulp where the result is a normal number, else 0. NaN stays NaN.
static inline vec exp_negative(vec x) {
  const vec magic = all(12583039.0f);  // 1.5 * 2^23 + 127: the sum's low bits are the biased exponent
  const vec low = all(-87.0f);
  vec safe = x < low ? low : x;
  vec shifted = safe * all(1.44269504f) + magic;
  vec n = shifted - magic;
  vec r = n * all(2.12194440e-4f) + (n * all(-0.693359375f) + safe);
  vec p = r * all(1.39506003e-3f) + all(8.36895406e-3f);
  p = p * r + all(4.16662060e-2f);
  p = p * r + all(1.66665182e-1f);
  p = p * r + all(0.5f);
  p = (p * r) * r + r + all(1.0f);
  vec y = p * (vec)((bits)shifted << 23);
  return x < low ? vec{} : y;
}

// ---- transposition ----
#if defined(__clang__)
#if defined(__AVX512F__)
#define MW_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define MW_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define MW_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define MW_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define MW_LOW 0, 4, 1, 5
#define MW_HIGH 2, 6, 3, 7
#endif
static inline vec low_half(vec a, vec b) { return __builtin_shufflevector(a, b, MW_LOW); }
static inline vec high_half(vec a, vec b) { return __builtin_shufflevector(a, b, MW_HIGH); }
#else
static inline ivec interleaved(int start) {
  ivec out;
  for (int i = 0; i < VW; i++) out[i] = start + i / 2 + (i % 2) * VW;
  return out;
}
static inline vec low_half(vec a, vec b) { return __builtin_shuffle(a, b, interleaved(0)); }
static inline vec high_half(vec a, vec b) { return __builtin_shuffle(a, b, interleaved(VW / 2)); }
#endif
static inline void transpose(vec (&r)[VW]) {  // a perfect shuffle per level
#pragma GCC unroll 4
  for (int level = 1; level < VW; level *= 2) {
    vec t[VW];
#pragma GCC unroll 16
    for (int i = 0; i < VW / 2; i++) {
      t[2 * i] = low_half(r[i], r[i + VW / 2]);
      t[2 * i + 1] = high_half(r[i], r[i + VW / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < VW; i++) r[i] = t[i];
  }
}

// to[c][r] = from[r][c] for up to VW rows and columns; lanes of missing rows become 0.
static void transpose_tile(const float* from, int64_t step, int64_t rows, int64_t cols, float* to, int64_t to_step) {
  vec r[VW];
  if (rows >= VW && cols >= VW) {
#pragma GCC unroll 16
    for (int i = 0; i < VW; i++) r[i] = load(from + i * step);
  } else {
    for (int i = 0; i < VW; i++) {
      r[i] = vec{};
      if (i < rows) std::memcpy(&r[i], from + i * step, std::min<int64_t>(cols, VW) * sizeof(float));
    }
  }
  transpose(r);
  if (cols >= VW) {
#pragma GCC unroll 16
    for (int i = 0; i < VW; i++) store(to + i * to_step, r[i]);
  } else {
    for (int i = 0; i < cols; i++) store(to + i * to_step, r[i]);
  }
}
static void transpose_block(const float* from, int64_t step, int64_t rows, int64_t cols, float* to, int64_t to_step) {
  for (int64_t r = 0; r < rows; r += VW)
    for (int64_t c = 0; c < cols; c += VW)
      transpose_tile(from + r * step + c, step, rows - r, cols - c, to + c * to_step + r, to_step);
}
// The same for a mask, a tile at a time. Tiles of one value, which most masks are made of, need no shuffling. Lanes of
// missing rows repeat the last one.
enum Content { HIDDEN, NOTHING, VALUES };  // all -inf: no query of the tile sees any of its keys; all 0; anything
static Content mask_tile(const float* from, int64_t step, int64_t rows, int64_t cols, float* to, int64_t to_step) {
  const vec first = all(from[0]);
  vec r[VW];
  bits differ = {};
#pragma GCC unroll 16
  for (int i = 0; i < VW; i++) {
    const float* row = from + std::min<int64_t>(i, rows - 1) * step;
    r[i] = first;
    if (cols >= VW) r[i] = load(row);
    else std::memcpy(&r[i], row, cols * sizeof(float));
    differ |= (bits)r[i] ^ (bits)first;
  }
  uint32_t any = 0;
  for (int i = 0; i < VW; i++) any |= differ[i];
  if (any) transpose(r);
  for (int i = 0; i < std::min<int64_t>(cols, VW); i++) store(to + i * to_step, r[i]);
  return any ? VALUES : from[0] == LOWEST ? HIDDEN : from[0] == 0.0f ? NOTHING : VALUES;
}

// ---- scores ----
struct Rule {            // what follows the product, for one block of keys
  float scale;
  const float* mask;     // null, one value per key (`lane` 0), or [key][query]
  int64_t key, lane;     // its steps
  int64_t diagonal;      // causal: query lane l sees the keys up to l + diagonal
  vec apply(vec s, int64_t j, int v) const {
    s = s * all(scale);
    if (mask) s += lane ? load(mask + j * key + v * VW) : all(mask[j * key]);
    if (j > diagonal + v * VW) {
      ivec at;
      for (int i = 0; i < VW; i++) at[i] = i;
      s = at >= (int32_t)std::min<int64_t>(j - diagonal - v * VW, VW) - ivec{} ? s : all(LOWEST);
    }
    return s;
  }
};

// R keys times the N vectors of queries from v0 on: `s` row i is key j + i. Rows past `last` repeat it.
template <int R, int N>
static void score_tile(int64_t D, const float* k, int64_t step, const float* q, int64_t lanes, const Rule& rule,
                       int64_t j, int64_t last, int v0, float* s, vec* top) {
  const float* row[R];
  vec sum[R][N], earlier[R][N];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++) row[i] = k + std::min(j + i, last) * step;
  const float* at = q + v0 * VW;
  for (int64_t d = 0, end = std::min(D, SPAN);; end = std::min(D, end + SPAN)) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) sum[i][v] = vec{};
    const bool begun = d > 0;
    for (; d < end; d++, at += lanes) {
      vec x[N];
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) x[v] = *(const vec*)(at + v * VW);
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) {
        vec y = all(row[i][d]);
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) sum[i][v] += y * x[v];
      }
    }
    if (begun)
#pragma GCC unroll 8
      for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) sum[i][v] += earlier[i][v];
    if (d >= D) break;
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) earlier[i][v] = sum[i][v];
  }
#pragma GCC unroll 8
  for (int v = 0; v < N; v++) {
    vec most = top[v0 + v];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      vec t = rule.apply(sum[i][v], std::min(j + i, last), v0 + v);
      *(vec*)(s + (j + i) * lanes + (v0 + v) * VW) = t;
      most = larger(most, t);
    }
    top[v0 + v] = most;
  }
}
typedef void (*ScoreTile)(int64_t, const float*, int64_t, const float*, int64_t, const Rule&, int64_t, int64_t, int,
                          float*, vec*);
template <int R> static ScoreTile score_tile_of(int vectors) {
  static const ScoreTile kTiles[] = {score_tile<R, 1>, score_tile<R, 2>,
#if defined(__AVX512F__)
                                     score_tile<R, 3>, score_tile<R, 4>
#endif
  };
  return kTiles[vectors - 1];
}

// One query (a decoding step) would leave most lanes empty: here they run along the head, and then along the keys. `s`
// has a value per key, up to a whole vector. V's rows, read next, are fetched meanwhile. `q` is padded with zeros to
// whole vectors; the end of a row of K is copied into one.
static void dot_products(int64_t D, const float* k, int64_t step, const float* q, int64_t keys, const float* v,
                         int64_t v_step, float* s) {
  for (int64_t j = 0; j < keys; j += VW) {
    vec sum[VW];
#pragma GCC unroll 16
    for (int t = 0; t < VW; t++) sum[t] = vec{};
    for (int64_t d = 0; d < D; d += VW) {
      vec x = load(q + d);
#pragma GCC unroll 16
      for (int t = 0; t < VW; t++) {
        const float* row = k + std::min(j + t, keys - 1) * step + d;
        vec y = vec{};
        if (D - d >= VW) y = load(row);
        else std::memcpy(&y, row, (D - d) * sizeof(float));
        sum[t] += x * y;
        __builtin_prefetch(k + (j + t + VW) * step + d);
        __builtin_prefetch(v + (j + t) * v_step + d);
      }
    }
    transpose(sum);
#pragma GCC unroll 4
    for (int half = VW / 2; half; half /= 2)
#pragma GCC unroll 8
      for (int t = 0; t < half; t++) sum[t] += sum[t + half];
    *(vec*)(s + j) = sum[0];
  }
}

// s = exp(s - top) for `used` of `keys` keys of one vector of queries, 0 for the others; the sum over the keys.
static vec exponentials(float* s, int64_t lanes, int64_t used, int64_t keys, vec top) {
  vec a = vec{}, b = a, c = a, d = a;
  int64_t j = 0;
  for (; j + 4 <= used; j += 4, s += 4 * lanes) {
    vec p = exp_negative(*(vec*)s - top), q = exp_negative(*(vec*)(s + lanes) - top);
    vec r = exp_negative(*(vec*)(s + 2 * lanes) - top), t = exp_negative(*(vec*)(s + 3 * lanes) - top);
    *(vec*)s = p, *(vec*)(s + lanes) = q, *(vec*)(s + 2 * lanes) = r, *(vec*)(s + 3 * lanes) = t;
    a += p, b += q, c += r, d += t;
  }
  for (; j < used; j++, s += lanes) a += *(vec*)s = exp_negative(*(vec*)s - top);
  for (; j < keys; j++, s += lanes) *(vec*)s = vec{};
  return (a + b) + (c + d);
}

// ---- probabilities times V ----
// out[i][..] = (before[i] * out[i][..] + sum_j p[j][i] * v[j][..]) * after[i] for `rows` <= R queries, N vectors of the
// head; `before` null: out is new; `after` null: more keys follow.
template <int R, int N>
static void value_tile(int64_t keys, const float* p, int64_t lanes, const float* v, int64_t step, float* out,
                       int64_t out_step, int rows, const float* before, const float* after) {
  vec sum[R][N];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) sum[i][n] = vec{};
  for (int64_t j = 0; j < keys; j++, p += lanes, v += step) {
    vec y[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) y[n] = load(v + n * VW);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      vec x = all(p[i]);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) sum[i][n] += x * y[n];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++) {
    if (i >= rows) break;
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      vec t = sum[i][n];
      if (before) t += all(before[i]) * load(out + i * out_step + n * VW);
      if (after) t *= all(after[i]);
      store(out + i * out_step + n * VW, t);
    }
  }
}
typedef void (*ValueTile)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, int, const float*,
                          const float*);
template <int R> static ValueTile value_tile_of(int vectors) {
  static const ValueTile kTiles[] = {value_tile<R, 1>, value_tile<R, 2>,
#if defined(__AVX512F__)
                                     value_tile<R, 3>, value_tile<R, 4>
#endif
  };
  return kTiles[vectors - 1];
}

// ---- one block of queries ----
struct Sizes {
  int64_t batch, heads, kv_heads, queries, keys, head;
};
struct Strides {  // in elements; the last dimension of q, k, v and out is contiguous
  int64_t q[3], k[3], v[3], mask[4], out[3], lse[3];
};
struct Problem {
  Sizes n;
  Strides step;
  const float *q, *k, *v, *mask;
  float *out, *lse;
  float scale;
  bool causal;
};
struct Room {  // a growing buffer per thread; freed with the thread
  float* data = nullptr;
  int64_t size = 0;
  float* get(int64_t n) {
    if (n > size) {
      std::free(data);
      size = 0;
      data = (float*)std::aligned_alloc(64, (n * 4 + 63) / 64 * 64);
      if (!data) throw std::bad_alloc();
      size = n;
    }
    return data;
  }
  ~Room() { std::free(data); }
};
static thread_local Room scratch, values_room;

static int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Block {
  const Problem& p;
  const int64_t b, h, first, queries, lanes, head;  // `lanes`: queries as whole vectors; `head`: so too
  const float *k, *v;
  int64_t v_step;
  float *q, *s, *mask, *made, factor[LANES], share[LANES];
  vec top[NV], sum[NV];
  int64_t last[NV], reach;  // of the keys at hand: how many a vector of queries sees, and the most of these

  Block(const Problem& problem, int64_t batch, int64_t at, int64_t query, const float* values, int64_t values_step)
      : p(problem), b(batch), h(at), first(query), queries(std::min<int64_t>(LANES, p.n.queries - query)),
        lanes(whole(queries, VW)), head(whole(p.n.head, VW)), v(values), v_step(values_step) {
    k = p.k + b * p.step.k[0] + h / (p.n.heads / p.n.kv_heads) * p.step.k[1];
    q = scratch.get((head + 2 * (KEYS + TILE) + head) * LANES);
    s = q + head * LANES, mask = s + (KEYS + TILE) * LANES, made = mask + (KEYS + TILE) * LANES;
  }

  bool single() const { return queries == 1; }
  const float* query_rows() const { return p.q + b * p.step.q[0] + h * p.step.q[1] + first * p.step.q[2]; }
  float* out_rows() const { return p.out + b * p.step.out[0] + h * p.step.out[1] + first * p.step.out[2]; }

  void run() {
    const int64_t keys = p.causal ? std::min(p.n.keys, first + queries) : p.n.keys;
    if (!single()) transpose_block(query_rows(), p.step.q[2], queries, p.n.head, q, lanes);
    for (int64_t d = 0; single() && d < head; d++) q[d] = d < p.n.head ? query_rows()[d] : 0.0f;
    for (int n = 0; n < NV; n++) top[n] = all(LOWEST), sum[n] = vec{};
    const int64_t blocks = std::max<int64_t>(1, (keys + KEYS - 1) / KEYS);
    const int64_t size = std::min(KEYS, whole((keys + blocks - 1) / blocks, TILE));
    bool begun = false;
    for (int64_t j = 0; j < keys || !begun; j += size) {
      const int64_t here = std::min(size, keys - j);
      if (single()) single_row(j, here, begun);
      else probabilities(j, here, begun);
      const bool done = j + here >= keys;
      if (done) shares();
      products(j, begun, done);
      begun = true;
    }
    if (p.n.head != head)
      for (int64_t i = 0; i < queries; i++)
        std::memcpy(out_rows() + i * p.step.out[2], made + i * head, p.n.head * sizeof(float));
    if (p.lse) log_sums();
  }

  // What applies to keys [j, j + keys); fills `last`. Keys that a mask hides at the end of a block are not computed.
  Rule rule(int64_t j, int64_t keys) {
    Rule r{p.scale, nullptr, 0, 0, p.causal ? first - j : INT32_MAX};
    for (int n = 0; n < NV; n++) last[n] = keys;
    if (p.mask) add_mask(r, j, keys);
    reach = 0;
    for (int n = 0; n < (int)(lanes / VW); n++) {
      if (p.causal) last[n] = std::max<int64_t>(0, std::min(last[n], r.diagonal + (n + 1) * VW));
      reach = std::max(reach, last[n]);
    }
    return r;
  }

  void add_mask(Rule& r, int64_t j, int64_t keys) {
    const int64_t* m = p.step.mask;
    const float* from = p.mask + b * m[0] + h * m[1] + first * m[2] + j * m[3];
    if (m[2] == 0) {
      r.mask = from, r.key = m[3];
      while (keys && from[(keys - 1) * m[3]] == LOWEST) keys--;
      for (int n = 0; n < NV; n++) last[n] = keys;
      return;
    }
    if (m[3] != 1) {
      r.mask = mask, r.key = lanes, r.lane = 1;
      for (int64_t t = 0; t < keys; t++)
        for (int64_t i = 0; i < lanes; i++) mask[t * lanes + i] = i < queries ? from[i * m[2] + t * m[3]] : 0.0f;
      return;
    }
    bool needed = false;
    for (int64_t i = 0; i < queries; i += VW) {
      last[i / VW] = 0;
      for (int64_t t = 0; t < keys; t += VW) {
        const Content c = mask_tile(from + i * m[2] + t, m[2], queries - i, keys - t, mask + t * lanes + i, lanes);
        if (c != HIDDEN) last[i / VW] = std::min(t + VW, keys);
        needed |= c != NOTHING;
      }
    }
    if (needed) r.mask = mask, r.key = lanes, r.lane = 1;
  }

  // Probabilities of keys [j, j + keys), up to the running maximum; what was summed so far counts `factor` from now on.
  void probabilities(int64_t j, int64_t keys, bool begun) {
    const Rule r = rule(j, keys);
    const int vectors = (int)(lanes / VW);
    vec before[NV];
    for (int n = 0; n < NV; n++) before[n] = top[n];
    const float* from = k + j * p.step.k[2];
    for (int64_t t = 0; t < reach;) {
      int v0 = 0;
      while (last[v0] <= t) v0++;
      const bool few = reach - t <= 2;
      const ScoreTile tile = few ? score_tile_of<2>(vectors - v0) : score_tile_of<TILE>(vectors - v0);
      tile(p.n.head, from, p.step.k[2], q, lanes, r, t, reach - 1, v0, s, top);
      t += few ? 2 : TILE;
    }
    for (int n = 0; n < vectors; n++) {
      const vec safe = top[n] == all(LOWEST) ? vec{} : top[n];  // nothing seen yet: exp(-inf - 0) is the 0 it should be
      const vec old = begun ? exp_negative(before[n] - safe) : vec{};
      store(factor + n * VW, old);
      sum[n] = sum[n] * old + exponentials(s + n * VW, lanes, last[n], reach, safe);
    }
  }

  // The same for one query: its probabilities lie one after the other, and all lanes of `top` and `sum` are equal.
  void single_row(int64_t j, int64_t keys, bool begun) {
    reach = last[0] = p.causal ? std::max<int64_t>(0, std::min(keys, first + 1 - j)) : keys;
    dot_products(p.n.head, k + j * p.step.k[2], p.step.k[2], q, reach, v + j * v_step, v_step, s);
    const int64_t* m = p.step.mask;
    const float* from = p.mask ? p.mask + b * m[0] + h * m[1] + first * m[2] + j * m[3] : nullptr;
    const int64_t wide = whole(reach, VW);
    for (int64_t t = 0; t < wide; t++)
      s[t] = t >= reach ? LOWEST : from ? s[t] * p.scale + from[t * m[3]] : s[t] * p.scale;
    vec most = top[0], total = vec{};
    for (int64_t t = 0; t < wide; t += VW) most = larger(most, *(vec*)(s + t));
    float best = most[0];
    for (int i = 1; i < VW; i++) best = std::max(best, (float)most[i]);
    const vec safe = all(best == LOWEST ? 0.0f : best), old = begun ? exp_negative(top[0] - safe) : vec{};
    for (int64_t t = 0; t < wide; t += VW) total += *(vec*)(s + t) = exp_negative(*(vec*)(s + t) - safe);
    float all_lanes = 0.0f;
    for (int i = 0; i < VW; i++) all_lanes += total[i];
    top[0] = all(best), sum[0] = sum[0] * old + all(all_lanes);
    store(factor, old);
  }

  void shares() {
    for (int n = 0; n < (int)(lanes / VW); n++) {
      const vec total = sum[n] == vec{} ? all(1.0f) : sum[n];  // a row that sees nothing is 0
      store(share + n * VW, all(1.0f) / total);
    }
  }

  void products(int64_t j, bool begun, bool done) {
    const bool direct = p.n.head == head;
    float* out = direct ? out_rows() : made;
    const int64_t step = direct ? p.step.out[2] : head;
    const int64_t vectors = head / VW, chunks = (vectors + NV - 1) / NV, next = single() ? 1 : lanes;
    for (int64_t c = 0; c < chunks; c++) {
      const int64_t n = vectors * c / chunks, width = vectors * (c + 1) / chunks - n;
      for (int64_t i = 0; i < queries;) {
        const int rows = (int)std::min<int64_t>(TILE, queries - i), height = rows == 1 ? 1 : rows <= 4 ? 4 : TILE;
        const ValueTile tile = rows == 1   ? value_tile_of<1>((int)width)
                               : rows <= 4 ? value_tile_of<4>((int)width)
                                           : value_tile_of<TILE>((int)width);
        int64_t seen = std::max(last[i / VW], last[(std::min(i + height, lanes) - 1) / VW]);
        if (p.causal) seen = std::max<int64_t>(0, std::min(seen, first + i + height - j));
        tile(seen, s + i, next, v + j * v_step + n * VW, v_step, out + i * step + n * VW, step, rows,
             begun ? factor + i : nullptr, done ? share + i : nullptr);
        i += rows;
      }
    }
  }

  void log_sums() {
    float* to = p.lse + b * p.step.lse[0] + h * p.step.lse[1] + first * p.step.lse[2];
    for (int64_t i = 0; i < queries; i++) {
      const double most = top[i / VW][i % VW], total = sum[i / VW][i % VW];
      to[i * p.step.lse[2]] = (float)((most == LOWEST ? 0.0 : most) + std::log(total == 0.0 ? 1.0 : total));
    }
  }
};

// Rows of V one after the other, as whole vectors: strided rows fall on few cache sets, and tails need zeros.
static const float* packed_values(const float* v, int64_t step, int64_t keys, int64_t head) {
  const int64_t wide = whole(head, VW);
  float* to = values_room.get(keys * wide);
  for (int64_t j = 0; j < keys; j++) {
    std::memcpy(to + j * wide, v + j * step, head * sizeof(float));
    for (int64_t d = head; d < wide; d++) to[j * wide + d] = 0.0f;
  }
  return to;
}

static void run(const Problem& p, int threads) {
  const int64_t blocks = (p.n.queries + LANES - 1) / LANES, heads = p.n.batch * p.n.heads, wide = whole(p.n.head, VW);
  if (heads * blocks == 0 || p.n.head == 0) return;
  const bool narrow = wide != p.n.head, strided = p.step.v[2] != wide;
  const bool pack = narrow || (strided && p.n.queries > TILE && p.n.keys * wide <= (1 << 20));
  if (p.n.batch * p.n.heads * p.n.queries * p.n.keys * p.n.head < 32 * 1024) threads = 1;
  const int64_t parts = heads >= 4 * threads || heads % threads == 0 ? 1 : blocks;  // of a head
  const int64_t chunk = std::max<int64_t>(1, heads * parts / (8 * threads));  // neighbours: they share cache lines
  OutOfMemory memory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const float* ready = nullptr;  // whose values are packed
#pragma omp for schedule(dynamic, chunk)
    for (int64_t unit = 0; unit < heads * parts; unit++) {
      const int64_t b = unit / parts / p.n.heads, h = unit / parts % p.n.heads, part = unit % parts;
      const float* v = p.v + b * p.step.v[0] + h / (p.n.heads / p.n.kv_heads) * p.step.v[1];
      memory.watch([&] {
        const float* values = v;
        if (pack) {
          if (ready != v) packed_values(v, p.step.v[2], p.n.keys, p.n.head);
          ready = v, values = values_room.data;
        }
        for (int64_t i = blocks * part / parts; i < blocks * (part + 1) / parts; i++)
          Block(p, b, h, i * LANES, values, pack ? wide : p.step.v[2]).run();
      });
    }
  }
  memory.raise();
}
}  // namespace attention

// sizes: batch, heads, heads of k and v, queries, keys, head. strides: q, k, v [batch, head, row], mask [batch, head,
// query, key] (0 where it is broadcast), out and lse [batch, head, row]. `mask` and `lse` may be null.
extern "C" MW_EXPORT void mw_attention(int threads, const int64_t* sizes, const int64_t* strides, const float* q,
                                       const float* k, const float* v, const float* mask, float* out, float* lse,
                                       double scale, int causal) {
  attention::Problem p{{}, {}, q, k, v, mask, out, lse, (float)scale, causal != 0};
  std::memcpy(&p.n, sizes, sizeof p.n);
  std::memcpy(&p.step, strides, sizeof p.step);
  attention::run(p, threads);
}
"""
