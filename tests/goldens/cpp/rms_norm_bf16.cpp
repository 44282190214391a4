MW_KERNEL void rms_norm_bf16(const mw_bf16* x, const mw_bf16* w, mw_bf16* y, int64_t s0, int64_t begin, int64_t end) {
  for (int64_t p0 = begin; p0 < end; ++p0) {
    double v3_acc = 0;
    for (int64_t r0_lo = 0; r0_lo < 515; r0_lo += 128) {
      const int64_t r0_hi = mw_min(r0_lo + 128, int64_t(515));
      float v3_part = 0;
      #pragma omp simd reduction(+:v3_part)
      for (int64_t r0 = r0_lo; r0 < r0_hi; ++r0) {
        const mw_bf16 v0 = x[515*p0 + r0];
        const float v1 = mw_bf16_to_f32(v0);
        const float v2 = v1 * v1;
        v3_part += v2;
      }
      v3_acc += v3_part;
    }
    const float v3 = float(v3_acc);
    const float v5 = v3 * 0.0019417476f;
    const float v7 = v5 + 1e-06f;
    const float v8 = mw_rsqrt(v7);
    #pragma omp simd
    for (int64_t r0 = 0; r0 < 515; ++r0) {
      const mw_bf16 v0 = x[515*p0 + r0];
      const float v1 = mw_bf16_to_f32(v0);
      const float v9 = v1 * v8;
      const mw_bf16 v10 = w[r0];
      const float v11 = mw_bf16_to_f32(v10);
      const float v12 = v9 * v11;
      const mw_bf16 v13 = mw_f32_to_bf16(v12);
      y[515*p0 + r0] = v13;
    }
  }
}
