MW_KERNEL void many_axes_3_4_5_6(const float* x, const float* y, float* z, int64_t s0, int64_t s1, int64_t s2, int64_t s3, int64_t begin, int64_t end) {
  if (begin >= end) return;
  int64_t at = begin;
  int64_t p3 = at % (s3); at /= s3;
  int64_t p2 = at % (s2); at /= s2;
  int64_t p1 = at;
  for (int64_t item = begin; item < end; ++item) {
    #pragma omp simd
    for (int64_t p0 = 0; p0 < s0; ++p0) {
      const float v0 = x[p3*s0*s1*s2 + p2*s0*s1 + p1*s0 + p0];
      const float v1 = y[p0*s1*s2*s3 + p1*s2*s3 + p2*s3 + p3];
      const float v2 = v0 - v1;
      z[p3*s0*s1*s2 + p2*s0*s1 + p1*s0 + p0] = v2;
    }
    if (++p3 == s3) { p3 = 0; if (++p2 == s2) { p2 = 0; ++p1; } }
  }
}
