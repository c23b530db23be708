// The loops. This is the only twin of rule.py; tests/test_kernel.py holds them together.

#include "step.h"

#include <cmath>
#include <limits>
#include <type_traits>

#include "processors.h"

namespace keras_rmsprop {
namespace {

// Which options are on is known when this is compiled: with branches in it, the compiler
// left some of the loops scalar, ten times as slow.
template <bool kCentered, bool kMomentum, bool kNesterov, bool kCorrected, bool kDecays,
          typename T, typename W>
EACH_PROCESSOR void Loop(const Numbers<T>& numbers, const Part<T, W>& part) {
  const Numbers<T> n = numbers;
  const Part<T, W> p = part;
  // Bounded, as an infinite average would stay so. A NaN passes all comparisons here.
  const T most = std::numeric_limits<T>::max() / 4, most_root = std::sqrt(most);
  NO_OVERLAP
  for (int64_t i = 0; i < p.size; ++i) {
    const T w = static_cast<T>(p.weights[i]);
    T g = n.scale * p.gradient[i];
    if constexpr (kDecays) g += p.penalty * w;
    const T square = g * g;
    const T v = n.rho * p.velocity[i] + n.rest * (square > most ? most : square);
    p.velocity[i] = v;
    T spread = kCorrected ? v / n.correction : v;
    if constexpr (kCentered) {
      const T below = g > most_root ? most_root : g;
      const T bounded = below < -most_root ? -most_root : below;
      const T a = n.rho * p.average_gradient[i] + n.rest * bounded;
      p.average_gradient[i] = a;
      const T mean = kCorrected ? a / n.correction : a;
      spread -= mean * mean;
      // Mathematically >= 0; rounding takes it below, and the root to NaN.
      spread = spread < 0 ? T(0) : spread;
    }
    const T root = std::sqrt(spread + n.epsilon_inside) + n.epsilon_outside;
    T u = n.rate_inside * g / root;
    if constexpr (kMomentum) {
      const T m = n.momentum * p.momentum[i] + u;
      p.momentum[i] = m;
      u = kNesterov ? n.momentum * m + u : m;
    }
    u = n.rate_outside * u;
    if constexpr (kDecays) u += p.decay * w;
    // What is taken is rounded to the weights' dtype, then subtracted.
    p.weights[i] = static_cast<W>(w - static_cast<T>(static_cast<W>(u)));
  }
}

// The average of the weights follows them.
template <typename T>
EACH_PROCESSOR void Average(T share, int64_t size, const T* weights, T* average) {
  const T rest = 1 - share;
  NO_OVERLAP
  for (int64_t i = 0; i < size; ++i) {
    average[i] = share * average[i] + rest * weights[i];
  }
}

// Runs the loop for these options: those that are known already, and the flags.
template <bool... kKnown, typename T, typename W>
void Run(const Numbers<T>& numbers, const Part<T, W>& part) {
  Loop<kKnown...>(numbers, part);
}
template <bool... kKnown, typename T, typename W, typename... Flags>
void Run(const Numbers<T>& numbers, const Part<T, W>& part, bool flag, Flags... flags) {
  if (flag) {
    Run<kKnown..., true>(numbers, part, flags...);
  } else {
    Run<kKnown..., false>(numbers, part, flags...);
  }
}

// Eight sums, always of the same elements: the result is the same everywhere.
template <typename T>
EACH_PROCESSOR double SumOfSquares(const T* x, int64_t size) {
  constexpr int kSums = 8;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= size; i += kSums) {
    for (int j = 0; j < kSums; ++j) {
      const double y = x[i + j];
      sums[j] += y * y;
    }
  }
  for (int j = 0; i < size; ++i, ++j) sums[j] += double(x[i]) * double(x[i]);
  double sum = 0;
  for (double s : sums) sum += s;
  return sum;
}

}  // namespace

template <typename T, typename W>
void Step(const Numbers<T>& numbers, const Part<T, W>& part) {
  const bool has_momentum = part.momentum != nullptr;
  Run(numbers, part, part.average_gradient != nullptr, has_momentum,
      has_momentum && numbers.nesterov, numbers.correction != 1,
      part.penalty != 0 || part.decay != 0);
  if constexpr (std::is_same_v<T, W>) {
    if (part.average) Average(numbers.share, part.size, part.weights, part.average);
  }
}

template <typename T>
double Squares(const T* x, int64_t size) {
  return SumOfSquares(x, size);
}

template void Step(const Numbers<float>&, const Part<float, float>&);
template void Step(const Numbers<float>&, const Part<float, Bfloat16>&);
template void Step(const Numbers<float>&, const Part<float, Half>&);
template void Step(const Numbers<double>&, const Part<double, double>&);
template void Step(const Numbers<double>&, const Part<double, float>&);
template double Squares(const float*, int64_t);
template double Squares(const double*, int64_t);

}  // namespace keras_rmsprop
