// Meshwright kernel prelude: scalar functions that a C++ compiler turns into vector code inside `omp simd` loops.
//
// f32 functions are branch free and accurate to about 2 ulp over the whole range, infinities, NaN and denormals
// included. The hot ones (exp, log, tanh, erf, sigmoid) work in f32; the others work in f64 and round once.
// f64 functions are the C library's. Polynomials are near-minimax fits (Lawson iterations on Chebyshev nodes).
#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#undef NAN
#undef INFINITY
#define NAN __builtin_nanf("")
#define INFINITY __builtin_inff()
#define MW_INLINE static inline __attribute__((always_inline))
// One copy of each kernel: inlining into both branches of the parallel split would double the compile time.
#ifdef __clang__
#define MW_KERNEL static __attribute__((noinline))
#else
#define MW_KERNEL static __attribute__((noinline, noclone))
#endif

typedef uint16_t mw_bf16;  // raw bits
typedef uint16_t mw_f16;

// ---- bits and integers -------------------------------------------------------------------------
MW_INLINE uint32_t mw_bits(float x) { uint32_t u; __builtin_memcpy(&u, &x, 4); return u; }
MW_INLINE float mw_from_bits(uint32_t u) { float x; __builtin_memcpy(&x, &u, 4); return x; }
MW_INLINE uint64_t mw_bits(double x) { uint64_t u; __builtin_memcpy(&u, &x, 8); return u; }
MW_INLINE double mw_from_bits(uint64_t u) { double x; __builtin_memcpy(&x, &u, 8); return x; }
MW_INLINE bool mw_negative(float x) { return mw_bits(x) >> 31; }  // the sign bit: true for -0 too

#define MW_INTEGERS(T, U, BITS)                                                                                \
  MW_INLINE T mw_abs(T a) { return a < 0 ? -a : a; }                                                           \
  MW_INLINE T mw_sign(T a) { return (a > 0) - (a < 0); }                                                       \
  MW_INLINE T mw_max(T a, T b) { return a > b ? a : b; }                                                       \
  MW_INLINE T mw_min(T a, T b) { return a < b ? a : b; }                                                       \
  /* A divisor of 0 or -1 must not trap: 0 gives 0, -1 negates with wrap-around. */                            \
  MW_INLINE T mw_truncdiv(T a, T b) {                                                                          \
    const T safe = (b == 0) | (b == -1) ? 1 : b;                                                               \
    const T q = a / safe;                                                                                      \
    return b == 0 ? 0 : b == -1 ? -a : q;                                                                      \
  }                                                                                                            \
  MW_INLINE T mw_fmod(T a, T b) { return a - mw_truncdiv(a, b) * b; }                                          \
  MW_INLINE T mw_floordiv(T a, T b) {                                                                          \
    const T q = mw_truncdiv(a, b);                                                                             \
    return q - ((a - q * b != 0) & ((a < 0) != (b < 0)) & (b != 0));                                           \
  }                                                                                                            \
  MW_INLINE T mw_mod(T a, T b) {                                                                               \
    const T m = mw_fmod(a, b);                                                                                 \
    return (m != 0) & ((m < 0) != (b < 0)) & (b != 0) ? m + b : m;                                             \
  }                                                                                                            \
  /* Shifts by a negative count or by the width and more push everything out, as in torch. */                  \
  MW_INLINE T mw_shl(T a, T b) { return (b < 0) | (b >= BITS) ? 0 : T(U(a) << (U(b) & (BITS - 1))); }          \
  MW_INLINE T mw_shr(T a, T b) { return a >> ((b < 0) | (b >= BITS) ? BITS - 1 : b); }                         \
  MW_INLINE T mw_ipow(T a, T b) {                                                                              \
    T result = 1;                                                                                              \
    for (; b > 0; b >>= 1) { result = b & 1 ? result * a : result; a = a * a; }                                \
    return result;                                                                                             \
  }
MW_INTEGERS(int32_t, uint32_t, 32)
MW_INTEGERS(int64_t, uint64_t, 64)

// ---- narrow floats: round to nearest even, NaN stays NaN -----------------------------------------
MW_INLINE float mw_bf16_to_f32(mw_bf16 h) { return mw_from_bits(uint32_t(h) << 16); }
MW_INLINE mw_bf16 mw_f32_to_bf16(float x) {
  const uint32_t u = mw_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return mw_bf16(x != x ? 0x7fc0u : rounded);
}
MW_INLINE float mw_f16_to_f32(mw_f16 h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, body = uint32_t(h & 0x7fffu) << 13;
  // A product with 2^112 re-biases the exponent and normalises denormals; infinities and NaN need theirs back.
  const float scaled = mw_from_bits(body) * 0x1p+112f;
  const uint32_t special = body >= 0x0f800000u ? 0x7f800000u : 0u;
  return mw_from_bits(sign | mw_bits(scaled) | special);
}
MW_INLINE mw_f16 mw_f32_to_f16(float x) {
  const uint32_t u = mw_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 puts a denormal's bits at the low end, rounded to nearest even by the addition itself.
  const uint32_t denormal = mw_bits(mw_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? denormal : normal;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return mw_f16(sign | (magnitude >= 0x477ff000u ? large : finite));
}

// ---- exact float functions -------------------------------------------------------------------
#if defined(__FMA__) || defined(__aarch64__) || defined(__ARM_FEATURE_FMA)
#define MW_HAS_FMA
MW_INLINE float mw_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MW_INLINE double mw_fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
MW_INLINE float mw_fma(float a, float b, float c) { return a * b + c; }
MW_INLINE double mw_fma(double a, double b, double c) { return a * b + c; }
#endif

#define MW_FLOATS(T, F)                                                                                        \
  MW_INLINE T mw_abs(T a) { return __builtin_fabs##F(a); }                                                     \
  MW_INLINE T mw_sign(T a) { return T(a > 0) - T(a < 0); }                                                     \
  MW_INLINE T mw_max(T a, T b) { return (a > b) | (a != a) ? a : b; }                                          \
  MW_INLINE T mw_min(T a, T b) { return (a < b) | (a != a) ? a : b; }                                          \
  MW_INLINE T mw_copysign(T a, T b) { return __builtin_copysign##F(a, b); }                                    \
  MW_INLINE T mw_sqrt(T a) { return __builtin_sqrt##F(a); }                                                    \
  MW_INLINE T mw_rsqrt(T a) { return 1 / __builtin_sqrt##F(a); }                                               \
  MW_INLINE T mw_reciprocal(T a) { return 1 / a; }                                                             \
  MW_INLINE bool mw_isinf(T a) { return __builtin_fabs##F(a) == T(INFINITY); }                                 \
  MW_INLINE T mw_floor(T a) { return __builtin_floor##F(a); }                                                  \
  MW_INLINE T mw_ceil(T a) { return __builtin_ceil##F(a); }                                                    \
  MW_INLINE T mw_trunc(T a) { return __builtin_trunc##F(a); }                                                  \
  MW_INLINE T mw_round(T a) { return __builtin_rint##F(a); }                                                   \
  MW_INLINE T mw_truncdiv(T a, T b) { return __builtin_trunc##F(a / b); }                                      \
  MW_INLINE T mw_fmod(T a, T b) { return __builtin_fmod##F(a, b); }                                            \
  MW_INLINE T mw_mod(T a, T b) {                                                                               \
    const T m = __builtin_fmod##F(a, b);                                                                       \
    return (m != 0) & ((b < 0) != (m < 0)) ? m + b : m;                                                        \
  }                                                                                                            \
  MW_INLINE T mw_floordiv(T a, T b) {                                                                          \
    const T m = __builtin_fmod##F(a, b);                                                                       \
    T q = (a - m) / b;                                                                                         \
    q = (m != 0) & ((b < 0) != (m < 0)) ? q - 1 : q;                                                           \
    const T low = __builtin_floor##F(q), near = q - low > T(0.5) ? low + 1 : low;                              \
    return b == 0 ? a / b : q == 0 ? __builtin_copysign##F(T(0), a / b) : near;                                \
  }
MW_FLOATS(float, f)
MW_FLOATS(double, )

// ---- f32: the hot functions --------------------------------------------------------------------
// x = n ln 2 + r with n = round(x / ln 2), for x in [-104, 89]. The magic addend rounds in one addition and leaves
// n + 254 in the low bits of `bits`.
MW_INLINE float mw_exp_reduce(float x, uint32_t* bits) {
  const float shifted = mw_fma(x, 1.44269504f, 12583166.f);
  const float k = shifted - 12583166.f;
  *bits = mw_bits(shifted);
  return mw_fma(k, 2.12194440e-4f, mw_fma(k, -0.693359375f, x));
}
// 2^n as a product of two normal numbers: 2^n alone may be denormal or overflow
MW_INLINE float mw_low_power(uint32_t bits) { return mw_from_bits((bits >> 1) << 23); }
MW_INLINE float mw_high_power(uint32_t bits) { return mw_from_bits((bits - (bits >> 1)) << 23); }
// exp(r) - 1 on |r| <= ln 2 / 2
MW_INLINE float mw_exp_core(float r) {
  float p = mw_fma(1.39506003e-3f, r, 8.36895406e-3f);
  p = mw_fma(p, r, 4.16662060e-2f);
  p = mw_fma(p, r, 1.66665182e-1f);
  p = mw_fma(p, r, 0.5f);
  return mw_fma(p * r, r, r);
}
MW_INLINE float mw_exp(float x) {
  // Below -104 the result is 0; to compute it would underflow, at a hundred cycles a time (masked softmax: exp(-inf)).
  const bool vanishes = x < -104.f;
  const float below = x > 89.f ? 89.f : x, clamped = vanishes ? 0.f : below;
  uint32_t bits;
  const float e = mw_exp_core(mw_exp_reduce(clamped, &bits)) + 1.f;
  const float y = e * mw_low_power(bits) * mw_high_power(bits);
  return vanishes ? 0.f : y;
}
// Like mw_exp_reduce for x in [-60, 0], where one power is normal: `*power` is 2^n.
MW_INLINE float mw_exp_reduce_small(float x, float* power) {
  const float shifted = mw_fma(x, 1.44269504f, 12583039.f);
  *power = mw_from_bits(mw_bits(shifted) << 23);
  return mw_fma(shifted - 12583039.f, -0.693147182f, x);
}
MW_INLINE float mw_log(float x) {
  const bool tiny = x < 0x1p-126f;
  const uint32_t u = mw_bits(tiny ? x * 0x1p+23f : x);
  const int32_t e = int32_t(u - 0x3f3504f3u) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const float f = mw_from_bits(u - (uint32_t(e) << 23)) - 1.f;
  float p = mw_fma(-7.85954595e-2f, f, 1.28816217e-1f);
  p = mw_fma(p, f, -1.31287679e-1f);
  p = mw_fma(p, f, 1.41811967e-1f);
  p = mw_fma(p, f, -1.66245535e-1f);
  p = mw_fma(p, f, 2.00022861e-1f);
  p = mw_fma(p, f, -2.50008106e-1f);
  p = mw_fma(p, f, 3.33333164e-1f);
  const float k = float(e) - (tiny ? 23.f : 0.f), square = f * f;
  float y = mw_fma(p * f, square, mw_fma(-0.5f, square, k * -2.12194440e-4f)) + f;
  y = mw_fma(k, 0.693359375f, y);
  y = x > 3.40282347e+38f ? x : y;
  y = x == 0.f ? -INFINITY : y;
  return (x < 0.f) | (x != x) ? NAN : y;
}
MW_INLINE float mw_sigmoid(float x) { return 1.f / (1.f + mw_exp(-x)); }
MW_INLINE float mw_tanh(float x) {
  const float t = __builtin_fabsf(x), z = x * x;
  float p = mw_fma(1.64587442e-2f, z, -5.26841357e-2f);
  p = mw_fma(p, z, 1.33209422e-1f);
  p = mw_fma(p, z, -3.33329588e-1f);
  const float near = mw_fma(p * z, x, x);
  const float clamped = t > 10.f ? 10.f : t;
  float power;
  const float e = (mw_exp_core(mw_exp_reduce_small(-2.f * clamped, &power)) + 1.f) * power;
  const float far = __builtin_copysignf((1.f - e) / (1.f + e), x);
  return t < 0.55f ? near : far;
}
MW_INLINE float mw_erf(float x) {
  const float t = __builtin_fabsf(x), z = x * x;
  float p = mw_fma(-6.11129159e-4f, z, 5.01622818e-3f);
  p = mw_fma(p, z, -2.67819576e-2f);
  p = mw_fma(p, z, 1.12822302e-1f);
  p = mw_fma(p, z, -3.76125336e-1f);
  p = mw_fma(p, z, 1.28379151e-1f);
  const float near = mw_fma(p, x, x);
  const float clamped = t > 3.95f ? 3.95f : t;
  float q = mw_fma(2.03678021e-4f, clamped, -3.11786565e-3f);  // log(erfc(t))
  q = mw_fma(q, clamped, 2.25190949e-2f);
  q = mw_fma(q, clamped, -1.04526006e-1f);
  q = mw_fma(q, clamped, -6.36518836e-1f);
  q = mw_fma(q, clamped, -1.12806106f);
  q = mw_fma(q, clamped, -1.04515741e-4f);
  float power;
  const float r = mw_exp_reduce_small(q, &power);
  float e = mw_fma(8.37948546e-3f, r, 4.18999679e-2f);
  e = mw_fma(e, r, 1.66663572e-1f);
  e = mw_fma(e, r, 4.99991298e-1f);
  e = mw_fma(e, r, 1.f);
  e = mw_fma(e, r, 1.f);
  const float far = __builtin_copysignf(1.f - e * power, x);
  return t < 0.9f ? near : far;
}
MW_INLINE float mw_expm1(float x) {
  const float clamped = x < -18.f ? -18.f : x > 89.f ? 89.f : x;
  uint32_t bits;
  const float e = mw_exp_core(mw_exp_reduce(clamped, &bits));
  const float low = mw_low_power(bits), high = mw_high_power(bits);
  const float inverse = mw_from_bits(0x7f000000u - mw_bits(high));
  const float y = mw_fma(e, low, low - inverse) * high;
  return x == 0.f ? x : y;
}

// ---- f32 by way of f64 -------------------------------------------------------------------------
MW_INLINE double mw_exp_wide(double x) {  // relative error 1e-12
  x = x < -800. ? -800. : x;
  x = x > 800. ? 800. : x;
  const double shifted = mw_fma(x, 1.4426950408889634, 6755399441055744.);
  const double k = shifted - 6755399441055744.;
  const double r = mw_fma(k, -1.9082149292705877e-10, mw_fma(k, -0.6931471803691238, x));
  double p = mw_fma(2.488776811148679e-05, r, 0.00019909369319105058);
  p = mw_fma(p, r, 0.0013888796085368361);
  p = mw_fma(p, r, 0.008333281078353003);
  p = mw_fma(p, r, 0.04166666705632419);
  p = mw_fma(p, r, 0.1666666678729498);
  p = mw_fma(p, r, 0.4999999999951596);
  const double e = mw_fma(p * r, r, r) + 1.;
  const uint64_t n = mw_bits(shifted) << 52;  // low bits of the rounded exponent, at the exponent's place
  const double y = mw_from_bits(mw_bits(e) + n);
  return x <= -700. ? 0. : x >= 700. ? double(INFINITY) : x != x ? x : y;
}
MW_INLINE double mw_log_wide(double x) {  // full f64 accuracy for normal x > 0
  const uint64_t u = mw_bits(x);
  const int64_t e = int64_t(u - UINT64_C(0x3fe6a09e667f3bcd)) >> 52;
  const double m = mw_from_bits(u - (uint64_t(e) << 52));
  const double s = (m - 1.) / (m + 1.), z = s * s;
  double p = mw_fma(0.14784473086813957, z, 0.1531570076148656);
  p = mw_fma(p, z, 0.1818347659367473);
  p = mw_fma(p, z, 0.22222200779197482);
  p = mw_fma(p, z, 0.2857142871521068);
  p = mw_fma(p, z, 0.39999999999564617);
  p = mw_fma(p, z, 0.6666666666666707);
  // The exponent as a double without an integer conversion (AVX2 has none for 64 bits).
  const double k = mw_from_bits(uint64_t(e) + UINT64_C(0x4338000000000000)) - 6755399441055744.;
  const double y = mw_fma(k, 0.6931471805599453, mw_fma(p * z, s, 2. * s));
  const double special = x == 0. ? -double(INFINITY) : x > 0. ? x : double(NAN);
  return (x > 0.) & (x < double(INFINITY)) ? y : special;
}
MW_INLINE double mw_log1p_wide(double x) {
  const double u = 1. + x;
  const double y = mw_log_wide(u) + (x - (u - 1.)) / u;
  return (u > 0.) & (u < double(INFINITY)) ? y : mw_log_wide(u);
}
MW_INLINE double mw_expm1_wide(double x) {
  double p = mw_fma(2.7648886244514764e-07, x, 2.7635139691197587e-06);
  p = mw_fma(p, x, 2.4801443810277627e-05);
  p = mw_fma(p, x, 0.00019841184785429194);
  p = mw_fma(p, x, 0.0013888888986291793);
  p = mw_fma(p, x, 0.008333333371272823);
  p = mw_fma(p, x, 0.0416666666663976);
  p = mw_fma(p, x, 0.16666666666610488);
  p = mw_fma(p, x, 0.5000000000000028);
  const double near = mw_fma(p * x, x, x);
  return __builtin_fabs(x) < 0.34 ? near : mw_exp_wide(x) - 1.;
}
MW_INLINE double mw_atan_wide(double x) {
  const double t = __builtin_fabs(x);
  const bool large = t > 2.414213562373095, middle = t > 0.41421356237309503;
  // One division reduces to [-tan(pi/8), tan(pi/8)] by the addition theorem.
  const double top = large ? -1. : middle ? t - 1. : t, bottom = large ? t : middle ? t + 1. : 1.;
  const double base = large ? 1.5707963267948966 : middle ? 0.7853981633974483 : 0.;
  const double a = top / bottom, z = a * a;
  double p = mw_fma(-0.02547702084087051, z, 0.05037735093026131);
  p = mw_fma(p, z, -0.06510382284147094);
  p = mw_fma(p, z, 0.07674347749225133);
  p = mw_fma(p, z, -0.09089618572683474);
  p = mw_fma(p, z, 0.11111054648902702);
  p = mw_fma(p, z, -0.14285712881689533);
  p = mw_fma(p, z, 0.19999999982835792);
  p = mw_fma(p, z, -0.33333333333260917);
  return __builtin_copysign(base + mw_fma(p * z, a, a), x);
}
// Quadrant and remainder of x / (pi/2); exact enough for f32 results up to |x| = 1e9.
MW_INLINE double mw_quadrant(double x, int64_t* q) {
  const double shifted = mw_fma(x, 0.6366197723675814, 6755399441055744.);
  const double k = shifted - 6755399441055744.;
  *q = int64_t(mw_bits(shifted));
#if defined(MW_HAS_FMA)
  double r = mw_fma(k, -1.5707963267341256, x);
#else  // the constant has 33 bits and k up to 30: in two parts, each product and difference is exact
  const double high = (k + 442721857769029238784.) - 442721857769029238784.;  // a multiple of 65536
  double r = (x - high * 1.5707963267341256) - (k - high) * 1.5707963267341256;
#endif
  r = mw_fma(k, -6.077100506303966e-11, r);
  return mw_fma(k, -2.0222662487959506e-21, r);
}
MW_INLINE double mw_sin_core(double r) {
  const double z = r * r;
  double p = mw_fma(-2.4761034752926435e-08, z, 2.755534944767614e-06);
  p = mw_fma(p, z, -0.0001984126378527675);
  p = mw_fma(p, z, 0.008333333325206388);
  p = mw_fma(p, z, -0.1666666666663126);
  return mw_fma(p * z, r, r);
}
MW_INLINE double mw_cos_core(double r) {
  const double z = r * r;
  double p = mw_fma(2.0647395545128475e-09, z, -2.755556190166041e-07);
  p = mw_fma(p, z, 2.4801580940942382e-05);
  p = mw_fma(p, z, -0.0013888888878204329);
  p = mw_fma(p, z, 0.041666666666601695);
  return mw_fma(p * z, z, mw_fma(-0.5, z, 1.));
}
MW_INLINE float mw_sin(float x) {
  int64_t q;
  const double r = mw_quadrant(x, &q), s = mw_sin_core(r), c = mw_cos_core(r);
  const double y = q & 1 ? c : s;
  return float(q & 2 ? -y : y);
}
MW_INLINE float mw_cos(float x) {
  int64_t q;
  const double r = mw_quadrant(x, &q), s = mw_sin_core(r), c = mw_cos_core(r);
  const double y = q & 1 ? s : c;
  return float((q + 1) & 2 ? -y : y);
}
MW_INLINE float mw_tan(float x) {
  int64_t q;
  const double r = mw_quadrant(x, &q), s = mw_sin_core(r), c = mw_cos_core(r);
  return float(q & 1 ? -c / s : s / c);
}
MW_INLINE float mw_exp2(float x) { return float(mw_exp_wide(x * 0.6931471805599453)); }
MW_INLINE float mw_log2(float x) { return float(mw_log_wide(x) * 1.4426950408889634); }
MW_INLINE float mw_log10(float x) { return float(mw_log_wide(x) * 0.4342944819032518); }
MW_INLINE float mw_log1p(float x) { return x == 0.f ? x : float(mw_log1p_wide(x)); }
MW_INLINE float mw_atan(float x) { return float(mw_atan_wide(x)); }
MW_INLINE float mw_asin(float x) {
  const double d = x;
  return float(mw_atan_wide(d / __builtin_sqrt((1. - d) * (1. + d))));
}
MW_INLINE float mw_acos(float x) {
  const double d = x, y = mw_atan_wide(__builtin_sqrt((1. - d) * (1. + d)) / d);
  return float(mw_bits(y) >> 63 ? y + 3.141592653589793 : y);  // 0/-1 and 1/-0 carry the sign
}
MW_INLINE float mw_sinh(float x) {
  const double e = mw_expm1_wide(__builtin_fabs(double(x))), y = 0.5 * (e + e / (e + 1.));
  return __builtin_copysignf(e > 1e300 ? INFINITY : float(y), x);
}
MW_INLINE float mw_cosh(float x) {
  const double e = mw_exp_wide(__builtin_fabs(double(x)));
  return float(0.5 * (e + 1. / e));
}
MW_INLINE float mw_asinh(float x) {
  const double t = __builtin_fabs(double(x)), y = mw_log1p_wide(t + t * t / (1. + __builtin_sqrt(t * t + 1.)));
  return __builtin_copysignf(t == double(INFINITY) ? INFINITY : x == 0.f ? 0.f : float(y), x);
}
MW_INLINE float mw_acosh(float x) {
  const double t = double(x) - 1.;
  return x < 1.f ? NAN : float(mw_log1p_wide(t + __builtin_sqrt(2. * t + t * t)));
}
MW_INLINE float mw_atanh(float x) {
  const double d = x;
  return x == 0.f ? x : float(0.5 * mw_log1p_wide(2. * d / (1. - d)));
}
MW_INLINE float mw_hypot(float x, float y) {
  const double a = x, b = y;
  return mw_isinf(x) | mw_isinf(y) ? INFINITY : float(__builtin_sqrt(a * a + b * b));
}
MW_INLINE float mw_atan2(float y, float x) {
  const double a = __builtin_fabs(double(y)), b = __builtin_fabs(double(x));
  const bool steep = a > b, equal = a == b;
  const double ratio = equal ? (a == 0. ? 0. : 1.) : steep ? b / a : a / b;
  const double t = mw_atan_wide(ratio), first = steep ? 1.5707963267948966 - t : t;
  const double half = mw_negative(x) ? 3.141592653589793 - first : first;
  return (x != x) | (y != y) ? NAN : __builtin_copysignf(float(half), y);
}
MW_INLINE float mw_pow(float x, float y) {
  const float t = __builtin_fabsf(x), whole = __builtin_truncf(y);
  const float half = 0.5f * y;
  const bool odd = (whole == y) & (__builtin_truncf(half) != half) & (__builtin_fabsf(y) < 16777216.f);
  const double magnitude = mw_exp_wide(double(y) * mw_log_wide(t));
  const double y1 = (x < 0.f) & (whole != y) & (t < INFINITY) ? double(NAN) : magnitude;
  const double y2 = odd & mw_negative(x) ? -y1 : y1;
  const double y3 = t == 1.f ? (mw_isinf(y) ? 1. : y2) : y2;
  const float result = (x != x) | (y != y) ? NAN : float(y3);
  return (y == 0.f) | (x == 1.f) ? 1.f : result;
}
MW_INLINE float mw_erfc(float x) { return __builtin_erfcf(x); }

// ---- f64: the C library ------------------------------------------------------------------------
#define MW_LIBM(NAME) MW_INLINE double mw_##NAME(double x) { return __builtin_##NAME(x); }
MW_LIBM(exp) MW_LIBM(exp2) MW_LIBM(expm1) MW_LIBM(log) MW_LIBM(log2) MW_LIBM(log10) MW_LIBM(log1p) MW_LIBM(sin)
MW_LIBM(cos) MW_LIBM(tan) MW_LIBM(asin) MW_LIBM(acos) MW_LIBM(atan) MW_LIBM(sinh) MW_LIBM(cosh) MW_LIBM(tanh)
MW_LIBM(asinh) MW_LIBM(acosh) MW_LIBM(atanh) MW_LIBM(erf) MW_LIBM(erfc)
MW_INLINE double mw_sigmoid(double x) { return 1. / (1. + __builtin_exp(-x)); }
MW_INLINE double mw_pow(double x, double y) { return __builtin_pow(x, y); }
MW_INLINE double mw_atan2(double y, double x) { return __builtin_atan2(y, x); }
MW_INLINE double mw_hypot(double x, double y) { return __builtin_hypot(x, y); }
