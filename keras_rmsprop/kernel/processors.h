// How loops are compiled.

#ifndef KERAS_RMSPROP_PROCESSORS_H_
#define KERAS_RMSPROP_PROCESSORS_H_

// A loop is compiled for several processors, and the library picks when it is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && \
    !defined(ONE_PROCESSOR)
#define EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EACH_PROCESSOR
#endif
// Buffers of different variables do not overlap.
#ifdef __clang__
#define NO_OVERLAP _Pragma("clang loop vectorize(assume_safety)")
#else
#define NO_OVERLAP _Pragma("GCC ivdep")
#endif

#endif  // KERAS_RMSPROP_PROCESSORS_H_
