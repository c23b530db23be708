// The arithmetic of a step, on plain pointers. It knows nothing of TensorFlow.

#ifndef KERAS_RMSPROP_STEP_H_
#define KERAS_RMSPROP_STEP_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "blocks.h"

namespace keras_rmsprop {

// A number with the upper half of a float's bits, rounded to the nearest, ties to even.
struct Bfloat16 {
  uint16_t bits;

  Bfloat16() = default;
  explicit Bfloat16(float x) {
    uint32_t b;
    std::memcpy(&b, &x, sizeof b);
    const bool is_nan = (b & 0x7fffffffu) > 0x7f800000u;
    bits = is_nan ? (b >> 16) | 0x40u : (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  }
  explicit operator float() const {
    const uint32_t b = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &b, sizeof x);
    return x;
  }
};

using Half = _Float16;

// The numbers of a step, named as the arguments of `RMSprop` are. What an option
// switches off is 0, or 1 where it is a factor.
template <typename T>
struct Numbers {
  T scale;                            // of the gradient; negative to maximize
  T rho, rest;                        // rest: 1 - rho, computed in double
  T momentum;
  T epsilon_inside, epsilon_outside;  // one of them is 0
  T correction;                       // 1 - rho^t with bias correction
  T rate_inside, rate_outside;        // one of them is the learning rate
  bool nesterov;
  T share;                            // of an average that stays when it follows
  uint32_t draw;                      // what random rounding depends on in this step
};

// The weight decay of a variable: one of the two is 0.
template <typename T>
struct Decay {
  T penalty;  // times w, added to the gradient
  T taken;    // times w, added to what is taken
};

// One variable or a part of one: where its elements are, and its weight decay.
template <typename T, typename W, typename S>
struct Part {
  int64_t size;
  const T* gradient;
  W* weights;
  S* velocity;
  S* momentum;          // or null
  S* average_gradient;  // or null
  Decay<T> decay;
  T* average;           // of the weights; or null, as always if T is not W
  int64_t place = 0;    // of the first element; random rounding goes by the place
};

// Returns a part that begins so many elements further on.
template <typename T, typename W, typename S>
Part<T, W, S> From(Part<T, W, S> part, int64_t start, int64_t size) {
  part.size = size;
  part.gradient += start;
  part.weights += start;
  // In blocks a part begins with a block.
  const int64_t begin = std::is_same_v<S, Coded> ? start / kBlock : start;
  part.velocity += begin;
  if (part.momentum) part.momentum += begin;
  if (part.average_gradient) part.average_gradient += begin;
  if (part.average) part.average += start;
  part.place += start;
  return part;
}

// Takes the step of one part; then its average follows. T is float or double. The
// weights W are that, or with float also Bfloat16 or Half, with double also float. The
// slots S are T, or with float also Bfloat16 or Coded, rounded up or down at random.
template <typename T, typename W, typename S>
void Step(const Numbers<T>& numbers, const Part<T, W, S>& part);

// Returns the sum of the squares: NaN or infinite if an element is.
template <typename T>
double Squares(const T* x, int64_t size);

}  // namespace keras_rmsprop

#endif  // KERAS_RMSPROP_STEP_H_
