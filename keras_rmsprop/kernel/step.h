// The arithmetic of a step, on plain pointers. It knows nothing of TensorFlow.

#ifndef KERAS_RMSPROP_STEP_H_
#define KERAS_RMSPROP_STEP_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

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

// What a step is asked for, named as the arguments of `RMSprop` are.
struct Request {
  double scale;  // of the gradient; negative to maximize
  double learning_rate, rho, momentum, epsilon;
  double correction;  // 1 - rho^t with bias correction, else 1
  double share;       // of an average that stays when it follows
  uint32_t draw;      // what random rounding depends on in this step
  bool epsilon_inside_sqrt, nesterov, lr_in_momentum, decoupled_weight_decay, cautious;
};

// The numbers of a step, as the loops need them. What an option switches off is 0, or 1
// where it is a factor.
template <typename T>
struct Numbers {
  T scale;                            // of the gradient; negative to maximize
  T rho, rest;                        // rest: 1 - rho, computed in double
  T momentum;
  T epsilon_inside, epsilon_outside;  // one of them is 0
  T correction;                       // 1 - rho^t with bias correction
  T rate_inside, rate_outside;        // one of them is the learning rate
  bool nesterov, cautious;
  T share;
  uint32_t draw;

  Numbers() = default;
  explicit Numbers(const Request& r)
      : scale(r.scale),
        rho(r.rho),
        rest(1 - r.rho),
        momentum(r.momentum),
        epsilon_inside(r.epsilon_inside_sqrt ? r.epsilon : 0),
        epsilon_outside(r.epsilon_inside_sqrt ? 0 : r.epsilon),
        correction(r.correction),
        rate_inside(r.lr_in_momentum ? r.learning_rate : 1),
        rate_outside(r.lr_in_momentum ? 1 : r.learning_rate),
        nesterov(r.nesterov),
        cautious(r.cautious),
        share(r.share),
        draw(r.draw) {}
};

// The weight decay of a variable: one of the two is 0.
template <typename T>
struct Decay {
  T penalty = 0;  // times w, added to the gradient
  T taken = 0;    // times w, added to what is taken

  Decay() = default;
  Decay(const Request& r, double decay) {
    if (decay == 0) return;  // an infinite rate times 0 is no number
    if (r.decoupled_weight_decay) {
      taken = static_cast<T>(r.learning_rate) * static_cast<T>(decay);
    } else {
      penalty = static_cast<T>(decay);
    }
  }
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
  T* update;            // where a cautious step leaves what it is to take; or null
  int64_t place = 0;    // of the first element; random rounding goes by the place
};

// Some elements of the variable with a number: what one thread does at a time.
struct Piece {
  int variable;
  int64_t start, size;
};

constexpr int64_t kPieceElements = 8192;

// Returns all elements of variables, in pieces.
inline std::vector<Piece> PiecesOf(const std::vector<int64_t>& sizes,
                                   int64_t most = kPieceElements) {
  std::vector<Piece> pieces;
  for (int i = 0; i < static_cast<int>(sizes.size()); ++i) {
    for (int64_t start = 0; start < sizes[i]; start += most) {
      pieces.push_back({i, start, std::min(most, sizes[i] - start)});
    }
  }
  return pieces;
}

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
  if (part.update) part.update += start;
  part.place += start;
  return part;
}

// Takes the step of one part; then its average follows. T is float or double. The
// weights W are that, or with float also Bfloat16 or Half, with double also float. The
// slots S are T, or with float also Bfloat16 or Coded, rounded up or down at random.
//
// A cautious step leaves the weights to `Take`, as it has to know all of a variable. It
// returns how many elements of the part agree with their gradient.
template <typename T, typename W, typename S>
int64_t Step(const Numbers<T>& numbers, const Part<T, W, S>& part);

// Takes what a cautious step has left, given which share of the variable agrees.
template <typename T, typename W, typename S>
void Take(const Numbers<T>& numbers, const Part<T, W, S>& part, double agreeing);

// Takes the step of some variables. For a cautious one each has an `update`. `for_each`
// is given pieces, and what to do with the number of a piece and the piece, on threads.
template <typename T, typename W, typename S, typename ForEach>
void StepAll(const Numbers<T>& numbers, const std::vector<Part<T, W, S>>& parts,
             ForEach for_each) {
  std::vector<int64_t> sizes;
  for (const auto& part : parts) sizes.push_back(part.size);
  const std::vector<Piece> pieces = PiecesOf(sizes);
  const auto part_of = [&](const Piece& piece) {
    return From(parts[piece.variable], piece.start, piece.size);
  };
  if (!numbers.cautious) {
    for_each(pieces,
             [&](int64_t, const Piece& piece) { Step(numbers, part_of(piece)); });
    return;
  }
  std::vector<int64_t> agreeing(pieces.size()), of_each(parts.size());
  for_each(pieces, [&](int64_t i, const Piece& piece) {
    agreeing[i] = Step(numbers, part_of(piece));
  });
  for (size_t i = 0; i < pieces.size(); ++i) of_each[pieces[i].variable] += agreeing[i];
  for_each(pieces, [&](int64_t, const Piece& piece) {
    const int i = piece.variable;
    Take(numbers, part_of(piece), static_cast<double>(of_each[i]) / sizes[i]);
  });
}

// Returns the sum of the squares: NaN or infinite if an element is.
template <typename T>
double Squares(const T* x, int64_t size);

// Returns the norm of all tensors together, the same with any number of threads: NaN or
// infinite if an element is. `for_each` is that of `StepAll`.
template <typename T, typename ForEach>
double NormOfAll(const std::vector<const T*>& tensors,
                 const std::vector<int64_t>& sizes, ForEach for_each) {
  const std::vector<Piece> pieces = PiecesOf(sizes);
  std::vector<double> sums(pieces.size());
  for_each(pieces, [&](int64_t i, const Piece& piece) {
    sums[i] = Squares(tensors[piece.variable] + piece.start, piece.size);
  });
  double sum = 0;
  for (double of_piece : sums) sum += of_piece;
  return std::sqrt(sum);
}

}  // namespace keras_rmsprop

#endif  // KERAS_RMSPROP_STEP_H_
