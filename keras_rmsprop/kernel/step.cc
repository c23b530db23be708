// The loops. This is the only twin of rule.py; tests/test_kernel.py holds them together.

#include "step.h"

#include <cmath>
#include <limits>

// A loop is compiled for several processors, and the library picks when it is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && \
    !defined(ONE_PROCESSOR)
#define EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EACH_PROCESSOR
#endif
#define INLINE inline __attribute__((always_inline))

namespace keras_rmsprop {
namespace {

template <bool kCentered, bool kMomentum, bool kCorrected, typename T, typename W>
INLINE void Loop(const Numbers<T>& numbers, const Part<T, W>& part) {
  const Numbers<T> n = numbers;
  // Bounded, as an infinite average would stay so. A NaN passes all comparisons here.
  const T most = std::numeric_limits<T>::max() / 4, most_root = std::sqrt(most);
  const T penalty = part.penalty, decay = part.decay;
  const T* __restrict gradient = part.gradient;
  W* __restrict weights = part.weights;
  T* __restrict velocity = part.velocity;
  T* __restrict momentum = part.momentum;
  T* __restrict average_gradient = part.average_gradient;
  for (int64_t i = 0; i < part.size; ++i) {
    const T w = static_cast<T>(weights[i]);
    T g = n.scale * gradient[i];
    if (penalty != 0) g += penalty * w;
    const T square = g * g;
    const T v = n.rho * velocity[i] + n.rest * (square > most ? most : square);
    velocity[i] = v;
    T spread = kCorrected ? v / n.correction : v;
    if (kCentered) {
      const T below = g > most_root ? most_root : g;
      const T bounded = below < -most_root ? -most_root : below;
      const T a = n.rho * average_gradient[i] + n.rest * bounded;
      average_gradient[i] = a;
      const T mean = kCorrected ? a / n.correction : a;
      spread -= mean * mean;
      // Mathematically >= 0; rounding takes it below, and the root to NaN.
      spread = spread < 0 ? T(0) : spread;
    }
    const T root = std::sqrt(spread + n.epsilon_inside) + n.epsilon_outside;
    T u = n.rate_inside * g / root;
    if (kMomentum) {
      const T m = n.momentum * momentum[i] + u;
      momentum[i] = m;
      u = n.nesterov ? n.momentum * m + u : m;
    }
    u = n.rate_outside * u;
    if (decay != 0) u += decay * w;
    // What is taken is rounded to the weights' dtype, then subtracted.
    weights[i] = static_cast<W>(w - static_cast<T>(static_cast<W>(u)));
  }
}

// Eight sums, always of the same elements: the result is the same everywhere.
template <typename T>
INLINE double SumOfSquares(const T* x, int64_t size) {
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

#define LOOP(NAME, CENTERED, MOMENTUM, CORRECTED, T, W)                      \
  namespace {                                                               \
  EACH_PROCESSOR void NAME(const Numbers<T>& numbers, const Part<T, W>& p) { \
    Loop<CENTERED, MOMENTUM, CORRECTED>(numbers, p);                        \
  }                                                                         \
  }

#define LOOPS(NAME, T, W)                                              \
  LOOP(Plain##NAME, false, false, false, T, W)                         \
  LOOP(PlainCorrected##NAME, false, false, true, T, W)                 \
  LOOP(Momentum##NAME, false, true, false, T, W)                       \
  LOOP(MomentumCorrected##NAME, false, true, true, T, W)               \
  LOOP(Centered##NAME, true, false, false, T, W)                       \
  LOOP(CenteredCorrected##NAME, true, false, true, T, W)               \
  LOOP(Both##NAME, true, true, false, T, W)                            \
  LOOP(BothCorrected##NAME, true, true, true, T, W)                    \
  template <>                                                          \
  void Step(const Numbers<T>& numbers, const Part<T, W>& p) {          \
    static constexpr void (*kLoops[])(const Numbers<T>&, const Part<T, W>&) = { \
        Plain##NAME,    PlainCorrected##NAME,    Momentum##NAME,       \
        MomentumCorrected##NAME, Centered##NAME, CenteredCorrected##NAME, \
        Both##NAME,     BothCorrected##NAME};                          \
    const int centered = p.average_gradient != nullptr;                \
    const int momentum = p.momentum != nullptr;                        \
    const int corrected = numbers.correction != 1;                     \
    kLoops[4 * centered + 2 * momentum + corrected](numbers, p);       \
  }

LOOPS(Float, float, float)
LOOPS(FloatBfloat16, float, Bfloat16)
LOOPS(FloatHalf, float, Half)
LOOPS(Double, double, double)
LOOPS(DoubleFloat, double, float)

#define SQUARES(NAME, T)                                  \
  namespace {                                             \
  EACH_PROCESSOR double NAME(const T* x, int64_t size) {  \
    return SumOfSquares(x, size);                         \
  }                                                       \
  }                                                       \
  template <>                                             \
  double Squares(const T* x, int64_t size) {              \
    return NAME(x, size);                                 \
  }

SQUARES(SquaresOfFloats, float)
SQUARES(SquaresOfDoubles, double)

}  // namespace keras_rmsprop
