// The loops. This is the only twin of rule.py; tests/test_kernel.py holds them together.

#include "step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "processors.h"

namespace keras_rmsprop {
namespace {

// What a draw depends on; see bits.py, of which this is the twin.
constexpr uint32_t kSlotStride = 27147;

uint32_t Mixed(uint32_t n) {
  for (int i = 0; i < 3; ++i) {
    n = (n * 40503 + 12345) & 0xffff;
    n ^= n >> 8;
  }
  return n;
}

// Returns a number as it is kept in a slot. The draw decides whether what bfloat16
// leaves away carries.
template <typename S, typename T>
inline S Kept(T x, uint32_t draw) {
  if constexpr (std::is_same_v<S, T>) {
    return x;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    S kept(x);
    kept.bits = finite ? (bits + (draw & 0xffffu)) >> 16 : kept.bits;
    return kept;
  }
}

// What is taken is rounded to the weights' dtype, then subtracted.
template <typename W, typename T>
inline W Less(T w, T taken) {
  return static_cast<W>(w - static_cast<T>(static_cast<W>(taken)));
}

// Which options are on is known when this is compiled: with branches in it, the compiler
// left some of the loops scalar, ten times as slow.
template <bool kCentered, bool kMomentum, bool kNesterov, bool kCautious,
          bool kCorrected, bool kDecays, typename T, typename W, typename S>
EACH_PROCESSOR int64_t Loop(const Numbers<T>& numbers, const Part<T, W, S>& part) {
  const Numbers<T> n = numbers;
  const Part<T, W, S> p = part;
  const uint32_t start = static_cast<uint32_t>(p.place) * kElementStride + Mixed(n.draw);
  // Bounded, as an infinite average would stay so. A NaN passes all comparisons here.
  const T most = std::numeric_limits<T>::max() / 4, most_root = std::sqrt(most);
  const bool is_penalty = p.decay.penalty != 0;  // else an infinite w would be in g, too
  int32_t agreeing = 0;
  NO_OVERLAP
  for (int64_t i = 0; i < p.size; ++i) {
    const T w = static_cast<T>(p.weights[i]);
    T g = n.scale * p.gradient[i];
    if constexpr (kDecays) g += p.decay.penalty * (is_penalty ? w : 0);
    const T square = g * g;
    const T old_v = static_cast<T>(p.velocity[i]);
    const T v = n.rho * old_v + n.rest * (square > most ? most : square);
    const uint32_t draw = start + static_cast<uint32_t>(i) * kElementStride;
    p.velocity[i] = Kept<S>(v, draw);
    T spread = kCorrected ? v / n.correction : v;
    if constexpr (kCentered) {
      const T below = g > most_root ? most_root : g;
      const T bounded = below < -most_root ? -most_root : below;
      const T a = n.rho * static_cast<T>(p.average_gradient[i]) + n.rest * bounded;
      p.average_gradient[i] = Kept<S>(a, draw + 2 * kSlotStride);
      const T mean = kCorrected ? a / n.correction : a;
      spread -= mean * mean;
      // Mathematically >= 0; rounding takes it below, and the root to NaN.
      spread = spread < 0 ? T(0) : spread;
    }
    const T root = std::sqrt(spread + n.epsilon_inside) + n.epsilon_outside;
    T u = n.rate_inside * g / root;
    if constexpr (kMomentum) {
      const T m = n.momentum * static_cast<T>(p.momentum[i]) + u;
      p.momentum[i] = Kept<S>(m, draw + kSlotStride);
      u = kNesterov ? n.momentum * m + u : m;
    }
    if constexpr (kCautious) {
      const bool agrees = u * g > 0;
      agreeing += agrees;
      p.update[i] = u * static_cast<T>(agrees);
    } else {
      u = n.rate_outside * u;
      if constexpr (kDecays) u += p.decay.taken * (is_penalty ? 0 : w);
      p.weights[i] = Less<W>(w, u);
    }
  }
  return agreeing;
}

template <bool kDecays, typename T, typename W>
EACH_PROCESSOR void TakeLoop(T rate, T agreeing, T decay, int64_t size, const T* update,
                             W* weights) {
  NO_OVERLAP
  for (int64_t i = 0; i < size; ++i) {
    const T w = static_cast<T>(weights[i]);
    const T u = rate * (update[i] / agreeing);
    weights[i] = Less<W>(w, kDecays ? u + decay * w : u);
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

// Without momentum a step is neither Nesterov's nor cautious. A cautious one always
// divides by the correction, which may be 1.
constexpr bool IsPossible(bool, bool momentum, bool nesterov, bool cautious,
                          bool corrected, bool) {
  return (momentum || !(nesterov || cautious)) && (corrected || !cautious);
}

// Runs the loop for these options: those that are known already, and the flags.
template <bool... kKnown, typename T, typename W, typename S>
int64_t Run(const Numbers<T>& numbers, const Part<T, W, S>& part) {
  if constexpr (IsPossible(kKnown...)) return Loop<kKnown...>(numbers, part);
  return 0;
}
template <bool... kKnown, typename T, typename W, typename S, typename... Flags>
int64_t Run(const Numbers<T>& numbers, const Part<T, W, S>& part, bool flag,
            Flags... flags) {
  return flag ? Run<kKnown..., true>(numbers, part, flags...)
              : Run<kKnown..., false>(numbers, part, flags...);
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

template <typename T, typename W, typename S>
void FollowWeights(const Numbers<T>& numbers, const Part<T, W, S>& part) {
  if constexpr (std::is_same_v<T, W>) {
    if (part.average) Average(numbers.share, part.size, part.weights, part.average);
  }
}

// Takes the step of a part whose slots have an element for each of its own.
template <typename T, typename W, typename S>
int64_t StepElements(const Numbers<T>& numbers, const Part<T, W, S>& part) {
  const bool has_momentum = part.momentum != nullptr;
  const bool is_cautious = has_momentum && numbers.cautious;
  const int64_t agreeing = Run(numbers, part, part.average_gradient != nullptr,
                               has_momentum, has_momentum && numbers.nesterov,
                               is_cautious, is_cautious || numbers.correction != 1,
                               part.decay.penalty != 0 || part.decay.taken != 0);
  if (!is_cautious) FollowWeights(numbers, part);
  return agreeing;
}

// Each block is read, updated and kept while it is in the nearest cache.
template <typename T, typename W>
int64_t StepBlocks(const Numbers<T>& numbers, const Part<T, W, Coded>& part) {
  float v[kBlock], m[kBlock];
  int64_t agreeing = 0;
  const bool has_momentum = part.momentum != nullptr;
  for (int64_t i = 0; i < part.size; i += kBlock) {
    const auto p = From(part, i, std::min<int64_t>(kBlock, part.size - i));
    Decode(*p.velocity, false, v);
    if (has_momentum) Decode(*p.momentum, true, m);
    agreeing += StepElements(
        numbers, Part<T, W, float>{p.size, p.gradient, p.weights, v,
                                   has_momentum ? m : nullptr, nullptr, p.decay,
                                   p.average, p.update, p.place});
    const uint32_t draw =
        static_cast<uint32_t>(p.place) * kElementStride + Mixed(numbers.draw);
    std::fill(v + p.size, v + kBlock, 0.0f);
    Encode(v, false, draw, p.velocity);
    if (!has_momentum) continue;
    std::fill(m + p.size, m + kBlock, 0.0f);
    Encode(m, true, draw + kSlotStride, p.momentum);
  }
  return agreeing;
}

}  // namespace

template <typename T, typename W, typename S>
int64_t Step(const Numbers<T>& numbers, const Part<T, W, S>& part) {
  if constexpr (std::is_same_v<S, Coded>) {
    return StepBlocks(numbers, part);
  } else {
    return StepElements(numbers, part);
  }
}

template <typename T, typename W, typename S>
void Take(const Numbers<T>& numbers, const Part<T, W, S>& part, double agreeing) {
  const T share = std::max(static_cast<T>(agreeing), T(1e-3));
  const auto take =
      part.decay.taken != 0 ? TakeLoop<true, T, W> : TakeLoop<false, T, W>;
  take(numbers.rate_outside, share, part.decay.taken, part.size, part.update,
       part.weights);
  FollowWeights(numbers, part);
}

template <typename T>
double Squares(const T* x, int64_t size) {
  return SumOfSquares(x, size);
}

#define INSTANTIATE(T, W, S)                                      \
  template int64_t Step(const Numbers<T>&, const Part<T, W, S>&); \
  template void Take(const Numbers<T>&, const Part<T, W, S>&, double);
INSTANTIATE(float, float, float)
INSTANTIATE(float, Bfloat16, float)
INSTANTIATE(float, Half, float)
INSTANTIATE(double, double, double)
INSTANTIATE(double, float, double)
INSTANTIATE(float, float, Bfloat16)
INSTANTIATE(float, Bfloat16, Bfloat16)
INSTANTIATE(float, Half, Bfloat16)
INSTANTIATE(float, float, Coded)
INSTANTIATE(float, Bfloat16, Coded)
INSTANTIATE(float, Half, Coded)
template double Squares(const float*, int64_t);
template double Squares(const double*, int64_t);

}  // namespace keras_rmsprop
