// TensorFlow's side of a step: its variables, its locks, its threads.

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "step.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/util/work_sharder.h"

// Loops are compiled for several processors; the first call picks its own.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EACH_PROCESSOR
#endif

namespace keras_rmsprop {

#define LOOP(NAME, T, W, CENTERED, MOMENTUM)                                   \
  EACH_PROCESSOR void NAME(const Numbers<T>& numbers, const Part<T, W>& part) { \
    Loop<T, W, CENTERED, MOMENTUM>(numbers, part);                             \
  }

#define LOOPS(NAME, T, W)                                       \
  LOOP(NAME##Plain, T, W, false, false)                         \
  LOOP(NAME##Momentum, T, W, false, true)                       \
  LOOP(NAME##Centered, T, W, true, false)                       \
  LOOP(NAME##Both, T, W, true, true)                            \
  template <>                                                   \
  void Step(const Numbers<T>& numbers, const Part<T, W>& part) { \
    if (part.average_gradient) {                                \
      part.momentum ? NAME##Both(numbers, part)                 \
                    : NAME##Centered(numbers, part);            \
    } else {                                                    \
      part.momentum ? NAME##Momentum(numbers, part)             \
                    : NAME##Plain(numbers, part);               \
    }                                                           \
  }

namespace {
EACH_PROCESSOR double SquaresOfFloat(const float* x, int64_t size) {
  // Eight sums, always the same ones: the result does not depend on the processor.
  double sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    for (int j = 0; j < 8; ++j) {
      const double y = x[i + j];
      sums[j] += y * y;
    }
  }
  for (int j = 0; i < size; ++i, ++j) {
    const double y = x[i];
    sums[j] += y * y;
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) +
         ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}
}  // namespace
}  // namespace keras_rmsprop
