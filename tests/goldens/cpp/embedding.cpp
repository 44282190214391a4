MW_KERNEL void embedding(const int64_t* ids, const float* w, const float* p, float* y, int64_t s0, int64_t begin, int64_t end) {
  for (int64_t p0 = begin; p0 < end; ++p0) {
    const int64_t v0 = ids[p0];
    #pragma omp simd
    for (int64_t p1 = 0; p1 < 40; ++p1) {
      const float v1 = w[40*v0 + p1];
      const float v2 = p[40*mw_mod(int64_t(p0), int64_t(4)) + p1];
      const float v3 = v1 + v2;
      y[40*p0 + p1] = v3;
    }
  }
}
