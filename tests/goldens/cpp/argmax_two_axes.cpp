MW_KERNEL void argmax_two_axes(const float* x, int64_t* y, int64_t begin, int64_t end) {
  for (int64_t p0 = begin; p0 < end; ++p0) {
    float v1_acc = -INFINITY;
    int64_t v1_at = 0;
    for (int64_t r0 = 0; r0 < 6; ++r0) {
      for (int64_t r1 = 0; r1 < 50; ++r1) {
        const float v0 = x[50*p0 + 200*r0 + r1];
        const bool v1_better = (v0 > v1_acc) | ((v0 != v0) & (v1_acc == v1_acc));
        v1_acc = v1_better ? v0 : v1_acc;
        v1_at = v1_better ? 50*r0 + r1 : v1_at;
      }
    }
    const int64_t v1 = v1_at;
    y[p0] = v1;
  }
}
