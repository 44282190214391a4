MW_KERNEL void layer_norm_768(const float* x, const float* r, const float* w, const float* b, float* h, float* y, float* mean, float* rstd, int64_t s0, int64_t begin, int64_t end) {
  for (int64_t p0 = begin; p0 < end; ++p0) {
    double v3_acc = 0;
    #pragma omp simd reduction(+:v3_acc)
    for (int64_t r0 = 0; r0 < 768; ++r0) {
      const float v0 = x[768*p0 + r0];
      const float v1 = r[768*p0 + r0];
      const float v2 = v0 + v1;
      v3_acc += v2;
    }
    const float v3 = float(v3_acc);
    double v8_acc = 0;
    const float v5 = v3 / 768.f;
    #pragma omp simd reduction(+:v8_acc)
    for (int64_t r0 = 0; r0 < 768; ++r0) {
      const float v0 = x[768*p0 + r0];
      const float v1 = r[768*p0 + r0];
      const float v2 = v0 + v1;
      const float v6 = v2 - v5;
      const float v7 = v6 * v6;
      v8_acc += v7;
    }
    const float v8 = float(v8_acc);
    const float v9 = v8 / 768.f;
    const float v11 = v9 + 1e-05f;
    const float v12 = mw_rsqrt(v11);
    #pragma omp simd
    for (int64_t r0 = 0; r0 < 768; ++r0) {
      const float v0 = x[768*p0 + r0];
      const float v1 = r[768*p0 + r0];
      const float v2 = v0 + v1;
      const float v6 = v2 - v5;
      const float v13 = v6 * v12;
      const float v14 = w[r0];
      const float v15 = v13 * v14;
      const float v16 = b[r0];
      const float v17 = v15 + v16;
      h[768*p0 + r0] = v2;
      y[768*p0 + r0] = v17;
    }
    mean[p0] = v5;
    rstd[p0] = v12;
  }
}
