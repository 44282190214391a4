// Meshwright kernel prelude, second part: per-thread scratch memory and the parallel split.

MW_INLINE void* mw_scratch(int slot, uint64_t bytes) {  // one growing block per thread and slot, kept for the next call
  static thread_local struct { char* data; uint64_t size; } blocks[16];
  if (blocks[slot].size < bytes) {
    __builtin_free(blocks[slot].data);
    blocks[slot].data = static_cast<char*>(__builtin_malloc(bytes + 64));
    if (!blocks[slot].data) __builtin_abort();
    blocks[slot].size = bytes;
  }
  return blocks[slot].data + (64 - reinterpret_cast<uint64_t>(blocks[slot].data) % 64);
}

// `ok`; sets `*bad` where it is false. From several threads at once, hence atomic; almost never, hence the branch.
MW_INLINE bool mw_expect(bool ok, int* bad) {
  if (__builtin_expect(!ok, 0)) __atomic_store_n(bad, 1, __ATOMIC_RELAXED);
  return ok;
}

// Threads for `work` (see `LoopPlan.work_per_item`): 1 inside a parallel region, for a single item, and below MW_GRAIN,
// where starting the team costs more than it saves. Measured with 2 threads on AVX-512: erf, softmax and addition broke
// even at 72, 76 and 54 thousand units.
#ifndef MW_GRAIN
#define MW_GRAIN 65536
#endif
MW_INLINE int mw_threads(int64_t items, int64_t work) {
#ifdef _OPENMP
  return items < 2 || work < MW_GRAIN || omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}
MW_INLINE int mw_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}
MW_INLINE int mw_team() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}
