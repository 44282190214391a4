MW_KERNEL void sum_f32_columns_row(const float* x, float* y, int64_t s0, int64_t s1, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t lane0 = tile * 128;
    const int64_t lanes = mw_min(lane0 + 128, int64_t(s1));
    double v1_acc[128];
    for (int64_t i = 0; i < 128; ++i) v1_acc[i] = 0;
    for (int64_t r0_lo = 0; r0_lo < s0; r0_lo += 64) {
      const int64_t r0_hi = mw_min(r0_lo + 64, int64_t(s0));
      float v1_part[128];
      for (int64_t i = 0; i < 128; ++i) v1_part[i] = 0;
      for (int64_t r0 = r0_lo; r0 < r0_hi; ++r0) {
        #pragma omp simd
        for (int64_t p0 = lane0; p0 < lanes; ++p0) {
          const float v0 = x[r0*s1 + p0];
          v1_part[p0 - lane0] += v0;
        }
      }
      for (int64_t i = 0; i < 128; ++i) v1_acc[i] += v1_part[i];
    }
    #pragma omp simd
    for (int64_t p0 = lane0; p0 < lanes; ++p0) {
      const float v1 = float(v1_acc[p0 - lane0]);
      y[p0] = v1;
    }
  }
}
