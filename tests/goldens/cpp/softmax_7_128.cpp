MW_KERNEL void softmax_7_128(const float* x, float* y, int64_t s0, int64_t begin, int64_t end) {
  alignas(64) float v3_row[128];
  for (int64_t p0 = begin; p0 < end; ++p0) {
    float v1_acc = -INFINITY;
    int v1_nan = 0;
    #pragma omp simd reduction(max:v1_acc) reduction(|:v1_nan)
    for (int64_t r0 = 0; r0 < 128; ++r0) {
      const float v0 = x[128*p0 + r0];
      v1_acc = v1_acc > v0 ? v1_acc : v0;
      v1_nan |= v0 != v0;
    }
    const float v1 = v1_nan ? float(NAN) : v1_acc;
    float v4_acc = 0;
    #pragma omp simd reduction(+:v4_acc)
    for (int64_t r0 = 0; r0 < 128; ++r0) {
      const float v0 = x[128*p0 + r0];
      const float v2 = v0 - v1;
      const float v3 = mw_exp(v2);
      v4_acc += v3;
      v3_row[r0] = v3;
    }
    const float v4 = v4_acc;
    #pragma omp simd
    for (int64_t r0 = 0; r0 < 128; ++r0) {
      const float v3 = v3_row[r0];
      const float v5 = v3 / v4;
      y[128*p0 + r0] = v5;
    }
  }
}
