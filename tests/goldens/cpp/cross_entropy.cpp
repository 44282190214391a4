MW_KERNEL void cross_entropy(const float* x, const int64_t* t, float* y, int64_t s0, int64_t s1, int64_t begin, int64_t end) {
  for (int64_t p0 = begin; p0 < end; ++p0) {
    float v1_acc = -INFINITY;
    int v1_nan = 0;
    #pragma omp simd reduction(max:v1_acc) reduction(|:v1_nan)
    for (int64_t r0 = 0; r0 < s1; ++r0) {
      const float v0 = x[p0*s1 + r0];
      v1_acc = v1_acc > v0 ? v1_acc : v0;
      v1_nan |= v0 != v0;
    }
    const float v1 = v1_nan ? float(NAN) : v1_acc;
    double v4_acc = 0;
    #pragma omp simd reduction(+:v4_acc)
    for (int64_t r0 = 0; r0 < s1; ++r0) {
      const float v0 = x[p0*s1 + r0];
      const float v2 = v0 - v1;
      const float v3 = mw_exp(v2);
      v4_acc += v3;
    }
    const float v4 = float(v4_acc);
    const float v5 = mw_log(v4);
    const float v6 = v5 + v1;
    const int64_t v7 = t[p0];
    const float v8 = x[p0*s1 + v7];
    const float v9 = v6 - v8;
    y[p0] = v9;
  }
}
