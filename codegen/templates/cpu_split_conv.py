"""The CPU convolution on AMX: relu(convolution + bias + other), fp32, channels last, by the products of cpu_split_gemm.

The input of a block of output rows is split once into planes [channel block][part][pixel][32 channels], padded, one
image per phase of the stride. Then a tile of A, 16 output pixels by 32 channels of one tap, is 1 KB of a plane at the
pixel's place plus the tap's shift: no copy per tap (im2col), no gather. Pixels are numbered through padded rows, so
that tiles run over row ends; the few products for padding are not stored. The weight [O, R, S, C] is a packed right
side with K = R * S * C, channels padded to 32.
"""

SOURCE = r"""
#if defined(MW_SPLIT)
struct ConvShape {  // as the caller gives it, in this order
  int64_t N, C, H, W, O, Ho, Wo, R, S, stride_h, stride_w, pad_h, pad_w, step_h, step_w, relu;
};
struct ConvPlan {
  ConvShape s;
  int64_t blocks, columns, halo;       // channel blocks; pixels of a padded row; rows of input beyond the output's
  std::vector<int64_t> phases;         // used phases of the stride, a * stride_w + b
  std::vector<std::array<int64_t, 3>> taps;  // index of the phase, shift in rows and in columns
  explicit ConvPlan(const ConvShape& shape) : s(shape) {
    blocks = (s.C + SK - 1) / SK;
    columns = s.Wo + (s.S - 1) * s.step_w / s.stride_w;
    halo = (s.R - 1) * s.step_h / s.stride_h;
    for (int64_t r = 0; r < s.R; r++)
      for (int64_t c = 0; c < s.S; c++) {
        const int64_t y = r * s.step_h, x = c * s.step_w, phase = y % s.stride_h * s.stride_w + x % s.stride_w;
        auto found = std::find(phases.begin(), phases.end(), phase);
        if (found == phases.end()) found = phases.insert(found, phase);
        taps.push_back({found - phases.begin(), y / s.stride_h, x / s.stride_w});
      }
  }
  int64_t row_bytes() const { return (int64_t)phases.size() * blocks * 3 * columns * SK * 2; }
};

// The input behind output rows r0..r0+rows of image n, as planes of `plane` pixels.
static MW_TILES void split_image(const ConvPlan& p, const float* x, int64_t n, int64_t r0, int64_t rows, int64_t plane,
                                 bf16* to, Range& range) {
  const ConvShape& s = p.s;
  for (size_t f = 0; f < p.phases.size(); f++, to += p.blocks * 3 * plane * SK) {
    const int64_t a = p.phases[f] / s.stride_w, b = p.phases[f] % s.stride_w;
    const int64_t j0 = std::max<int64_t>(0, (s.pad_w - b + s.stride_w - 1) / s.stride_w);
    const int64_t right = s.W - 1 + s.pad_w - b;  // negative where this phase holds padding only: no truncation to 0
    const int64_t j1 = right < 0 ? 0 : std::min(p.columns, right / s.stride_w + 1);
    for (int64_t i = 0; i < rows + p.halo; i++) {
      const int64_t h = (r0 + i) * s.stride_h + a - s.pad_h;
      const bool inside = h >= 0 && h < s.H && j0 < j1;
      bf16* row = to + i * p.columns * SK;
      if (!inside || j0 > 0 || j1 < p.columns)
        for (int64_t q = 0; q < p.blocks * 3; q++) std::memset(row + q * plane * SK, 0, p.columns * SK * 2);
      if (!inside) continue;
      const float* from = x + ((n * s.H + h) * s.W + b - s.pad_w) * s.C;
      for (int64_t j = j0; j < j1; j += SR)  // whole tiles: what spills over the row's end is written again or unused
        pack_lines(from + j * s.stride_w * s.C, s.stride_w * s.C, 1, std::min<int64_t>(SR, j1 - j), s.C, true,
                   row + j * SK, 3 * plane * SK, plane * SK, range);
    }
  }
}

// What is done to sums on their way out: relu(tile + sum + bias + other), rows to their places.
struct Finish {
  __mmask16 left, right;
  const float *bias, *other;
  float* out;
  bool relu;
  // While the tiles multiply: rows lie O apart, too far for the hardware to foresee.
  void fetch(const int64_t* place, int count) const {
    for (int i = 0; i < count; i++)
      if (place[i] >= 0)
        for (int j = 0; j < SC; j += 16) {
          __builtin_prefetch(out + place[i] + j, 1);
          if (other) __builtin_prefetch(other + place[i] + j, 0);
        }
  }
  MW_TILES void rows(const float* tile, const float* sum, const int64_t* place, int count) const {
    const __m512 bias_l = _mm512_maskz_loadu_ps(left, bias), bias_r = _mm512_maskz_loadu_ps(right, bias + 16);
    for (int i = 0; i < count; i++) {
      if (place[i] < 0) continue;
      __m512 l = _mm512_add_ps(_mm512_load_ps(tile + i * SC), bias_l);
      __m512 r = _mm512_add_ps(_mm512_load_ps(tile + i * SC + 16), bias_r);
      if (sum) {
        l = _mm512_add_ps(l, _mm512_load_ps(sum + i * SC));
        r = _mm512_add_ps(r, _mm512_load_ps(sum + i * SC + 16));
      }
      if (other) {
        l = _mm512_add_ps(l, _mm512_maskz_loadu_ps(left, other + place[i]));
        r = _mm512_add_ps(r, _mm512_maskz_loadu_ps(right, other + place[i] + 16));
      }
      if (relu) {  // NaN stays: the second operand is the answer when either is none
        l = _mm512_max_ps(_mm512_setzero_ps(), l);
        r = _mm512_max_ps(_mm512_setzero_ps(), r);
      }
      _mm512_mask_storeu_ps(out + place[i], left, l);
      _mm512_mask_storeu_ps(out + place[i] + 16, right, r);
    }
  }
};

// Output rows r0..r0+rows of image n, panels p0..p1. False when the values leave the range of the method.
static MW_TILES bool conv_block(const ConvPlan& p, int64_t n, int64_t r0, int64_t rows, int64_t p0, int64_t p1,
                                const float* x, const SplitB& b, const float* bias, const float* other, float* out) {
  const ConvShape& s = p.s;
  const int64_t pixels = (rows - 1) * p.columns + s.Wo, tiles = (pixels + SR - 1) / SR, pairs = (tiles + 1) / 2;
  const int64_t plane = (rows + p.halo) * p.columns + 2 * SR + p.columns, steps = (int64_t)p.taps.size() * p.blocks;
  bf16* planes = (bf16*)scratch_a.get((int64_t)p.phases.size() * p.blocks * 3 * plane * SK / 2);
  Range mine, theirs;
  split_image(p, x, n, r0, rows, plane, planes, mine);
  std::vector<int64_t> at;
  for (const auto& tap : p.taps)
    for (int64_t c = 0; c < p.blocks; c++)
      at.push_back(((tap[0] * p.blocks + c) * 3 * plane + tap[1] * p.columns + tap[2]) * SK);
  std::vector<int64_t> place(tiles * SR, -1);  // where an output pixel is stored, -1 for padding
  for (int64_t q = 0; q < pixels; q++)
    if (q % p.columns < s.Wo) place[q] = ((n * s.Ho + r0 + q / p.columns) * s.Wo + q % p.columns) * s.O;
  const int64_t span = std::min(L1_STEPS, steps);  // k steps whose tiles of B stay in L1 while all pixels use them
  float* sums = scratch_c.get(pairs * 2 * SR * SC);
  alignas(64) float tile[2 * SR * SC];
  const int lines = (int)((16 + pairs - 1) / pairs);
  const Tiles configured;
  for (int64_t panel = p0; panel < p1; panel++) {
    const bf16* z = b.pieces(panel, 0, 0, 0, theirs);
    if (!splits(mine, theirs)) break;
    const Finish finish{lanes(s.O - panel * SC), lanes(s.O - panel * SC - 16), bias + panel * SC,
                        other ? other + panel * SC : nullptr, out + panel * SC, s.relu != 0};
    for (int64_t k = 0; k < steps; k += span) {
      const int64_t n = std::min(span, steps - k);
      for (int64_t t = 0; t < tiles; t += 2) {
        const bf16* a = planes + t * SR * SK;
        const char* next = (const char*)(z + (k + n) * B_STEP) + t / 2 * n * 6 * lines * 64;
        const bool two = t + 1 < tiles, last = k + n == steps;
        float* sum = sums + t * SR * SC;
        float* to = k == 0 && !last ? sum : tile;
        const int64_t* steps_at = at.data() + k;
        const int rows_here = two ? 2 * SR : SR;
        if (last) finish.fetch(place.data() + t * SR, rows_here);
        if (two) multiply<2>(n, a, a + SR * SK, steps_at, plane * SK, z + k * B_STEP, to, next, lines);
        else multiply<1>(n, a, a, steps_at, plane * SK, z + k * B_STEP, to, next, lines);
        if (last) finish.rows(tile, k ? sum : nullptr, place.data() + t * SR, rows_here);
        else if (k)
          for (int q = 0; q < rows_here * SC; q += 16)
            _mm512_store_ps(sum + q, _mm512_add_ps(_mm512_load_ps(sum + q), _mm512_load_ps(tile + q)));
      }
    }
  }
  return p0 >= p1 || splits(mine, theirs);
}

static bool split_conv(int threads, const ConvShape& given, const float* x, const SplitB& b, const float* bias,
                       const float* other, float* out) {
  ConvShape s = given;
  if (s.R == 1 && s.S == 1 && s.stride_h == 1 && s.stride_w == 1 && s.pad_h == 0 && s.pad_w == 0)
    s.H = s.Ho = s.N * s.H, s.N = 1;  // no padding: images are rows of one
  const ConvPlan plan(s);
  const int64_t panels = (s.O + SC - 1) / SC, panel_bytes = (int64_t)plan.taps.size() * plan.blocks * B_STEP * 2;
  const int64_t room = std::max<int64_t>(256 << 10, (1536 << 10) - panel_bytes);  // of planes, beside a panel, in L2
  int64_t rows = std::max<int64_t>(1, std::min(s.Ho, room / plan.row_bytes() - plan.halo));
  const bool by_rows = threads > 1 && s.N * s.Ho * s.Wo >= 192 * threads;
  if (by_rows && s.N < threads) rows = std::min(rows, (s.Ho + threads - 1) / threads);
  const int64_t chunks = (s.Ho + rows - 1) / rows, even = (s.Ho + chunks - 1) / chunks;
  const int parts = by_rows ? 1 : std::max(1, threads);
  std::atomic<bool> fits{true};
  OutOfMemory memory;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic) collapse(2)
  for (int64_t task = 0; task < s.N * chunks; task++)
    for (int part = 0; part < parts; part++) {
      const int64_t n = task / chunks, r0 = task % chunks * even, p0 = panels * part / parts;
      const int64_t p1 = panels * (part + 1) / parts, here = std::min(even, s.Ho - r0);
      if (here <= 0 || p0 >= p1 || !fits) continue;
      memory.watch([&] {
        if (!conv_block(plan, n, r0, here, p0, p1, x, b, bias, other, out)) fits = false;
      });
    }
  memory.raise();
  return fits;
}
#endif

// relu(convolution(x, weight) + bias + other): x [N, H, W, C], out and other [N, Ho, Wo, O], dense; `packed` is the
// weight [O, R, S, C padded to 32] as a split right side. 0: not done (values outside the method's range, no AMX).
extern "C" MW_EXPORT int mw_conv(int threads, const int64_t* shape, const float* x, const void* packed,
                                 const float* bias, const float* other, float* out) {
#if defined(MW_SPLIT)
  ConvShape s;
  PackedHeader header;
  std::memcpy(&s, shape, sizeof s);
  std::memcpy(&header, packed, sizeof header);
  if (header.method != kSplit || !mw_split_ready()) return 0;
  if (s.N * s.Ho * s.Wo * s.O == 0) return 1;
  const int64_t K = s.R * s.S * ((s.C + SK - 1) / SK) * SK;
  const SplitB b{(const bf16*)((const char*)packed + kHeader), K, {header.largest, header.smallest}};
  if (!b.range.usable()) return 0;  // a dead channel's weights may be subnormal: not worth splitting the input
  return split_conv(threads, s, x, b, bias, other, out);
#else
  return 0;
#endif
}
"""
