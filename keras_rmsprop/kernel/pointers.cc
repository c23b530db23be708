// The kernel as functions of C, which are given pointers. They start their own threads.

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <exception>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "search.h"
#include "step.h"

namespace keras_rmsprop {
namespace {

// Below this a thread takes longer to start than what it saves.
constexpr int64_t kThreadElements = 1 << 19;

// Does something for all pieces, on so many threads at most.
template <typename Function>
void ForEach(const std::vector<Piece>& pieces, int most_threads, Function function) {
  int64_t size = 0;
  for (const Piece& piece : pieces) size += piece.size;
  const int64_t wanted = std::min<int64_t>(most_threads, size / kThreadElements);
  const int64_t count = std::max<int64_t>(wanted, 1), all = pieces.size();
  const auto share = [&](int64_t thread) {
    const int64_t end = all * (thread + 1) / count;
    for (int64_t i = all * thread / count; i < end; ++i) function(i, pieces[i]);
  };
  std::vector<std::thread> threads;
  threads.reserve(count);
  for (int64_t i = 1; i < count; ++i) {
    try {
      threads.emplace_back(share, i);
    } catch (const std::exception&) {  // there may be no more of them, or of memory
      share(i);
    }
  }
  share(0);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

// A variable: where its elements are. The last three may be null.
struct Variable {
  int64_t size;
  const void* gradient;
  void *weights, *velocity, *momentum, *average_gradient, *average;
};

namespace {

// Whether places of so many bytes each overlap.
bool Overlap(std::vector<std::pair<const char*, int64_t>> places) {
  std::sort(places.begin(), places.end());
  for (size_t i = 1; i < places.size(); ++i) {
    if (places[i - 1].first + places[i - 1].second > places[i].first) return true;
  }
  return false;
}

// How many bytes so many elements take.
template <typename T>
int64_t BytesOf(int64_t size) {
  if constexpr (std::is_same_v<T, Coded>) size = (size + kBlock - 1) / kBlock;
  return size * sizeof(T);
}

// Whether anything that is written to overlaps something else that is.
template <typename T, typename W, typename S>
bool Overlap(int count, const Variable* variables) {
  std::vector<std::pair<const char*, int64_t>> places;
  for (const Variable* one = variables; one < variables + count; ++one) {
    if (one->size == 0) continue;
    const auto add = [&](const void* place, int64_t bytes) {
      if (place) places.emplace_back(static_cast<const char*>(place), bytes);
    };
    add(one->weights, BytesOf<W>(one->size));
    add(one->velocity, BytesOf<S>(one->size));
    add(one->momentum, BytesOf<S>(one->size));
    add(one->average_gradient, BytesOf<S>(one->size));
    add(one->average, BytesOf<T>(one->size));
  }
  return Overlap(places);
}

template <typename T, typename W, typename S>
bool StepOf(const Request& request, int count, const Variable* variables,
            const double* decays, int threads) {
  if (Overlap<T, W, S>(count, variables)) return false;
  std::vector<Part<T, W, S>> parts;
  std::vector<std::unique_ptr<T[]>> updates;
  for (int i = 0; i < count; ++i) {
    const Variable* one = variables + i;
    if (request.cautious) updates.emplace_back(new T[one->size]);
    parts.push_back({
        one->size,
        static_cast<const T*>(one->gradient),
        static_cast<W*>(one->weights),
        static_cast<S*>(one->velocity),
        static_cast<S*>(one->momentum),
        static_cast<S*>(one->average_gradient),
        Decay<T>(request, decays[i]),
        static_cast<T*>(one->average),
        request.cautious ? updates.back().get() : nullptr,
    });
  }
  StepAll(Numbers<T>(request), parts,
          [&](const std::vector<Piece>& pieces, auto step) {
            ForEach(pieces, threads, step);
          });
  return true;
}

// A variable in the search: the elements that are looked at, and where all are.
struct Searched {
  Sample sample;
  int64_t looked_at, elements;
  const void *gradient, *weights;
  void *first_weights, *gradient_sums;
  const void* momentum;  // null: there is none
};

template <typename T, typename W>
Sums FollowOf(int count, const Searched* variables, double forgetting, double weight,
              int threads) {
  std::vector<Followed<T, W>> parts;
  for (const Searched* one = variables; one < variables + count; ++one) {
    parts.push_back({one->sample, one->looked_at, one->elements,
                     static_cast<const T*>(one->gradient),
                     static_cast<const W*>(one->weights),
                     static_cast<T*>(one->first_weights),
                     static_cast<T*>(one->gradient_sums),
                     static_cast<const T*>(one->momentum)});
  }
  return FollowAll(parts, static_cast<T>(forgetting), static_cast<T>(weight), false,
                   [&](const std::vector<Piece>& pieces, auto follow) {
                     ForEach(pieces, threads, follow);
                   });
}

template <typename T>
double NormOf(int count, const int64_t* sizes, const int64_t* places, int threads) {
  std::vector<const T*> tensors;
  for (int i = 0; i < count; ++i) tensors.push_back(reinterpret_cast<const T*>(places[i]));
  return NormOfAll(tensors, {sizes, sizes + count},
                   [&](const std::vector<Piece>& pieces, auto sum) {
                     ForEach(pieces, threads, sum);
                   });
}

}  // namespace

extern "C" {

// Takes the step of variables. `kind` is the place of their dtypes in `KINDS` of
// torch.py. Returns false, and changes nothing, if there is no such place, if variables or
// slots overlap, or if there is no memory for a cautious step.
bool keras_rmsprop_step(const Request* request, int kind, int count,
                        const Variable* variables, const double* decays,
                        int threads) {
  using Function = bool (*)(const Request&, int, const Variable*, const double*, int);
  const Function steps[] = {
      StepOf<float, float, float>,       StepOf<float, Bfloat16, float>,
      StepOf<float, Half, float>,        StepOf<float, float, Bfloat16>,
      StepOf<float, Bfloat16, Bfloat16>, StepOf<float, Half, Bfloat16>,
      StepOf<float, float, Coded>,       StepOf<float, Bfloat16, Coded>,
      StepOf<float, Half, Coded>,        StepOf<double, double, double>,
      StepOf<double, float, double>,
  };
  if (kind < 0 || kind >= static_cast<int>(std::size(steps))) return false;
  try {
    return steps[kind](*request, count, variables, decays, threads);
  } catch (const std::bad_alloc&) {
    return false;
  }
}

// Lets s of variables follow their gradients; see search.h. `kind` is the place of their
// dtypes in `SEARCHES` of torch.py. Writes the sums of all, four numbers.
void keras_rmsprop_follow(int kind, int count, const Searched* variables,
                          double forgetting, double weight, int threads,
                          Sums* sums) {
  using Function = Sums (*)(int, const Searched*, double, double, int);
  const Function follows[] = {FollowOf<float, float>, FollowOf<float, Bfloat16>,
                              FollowOf<float, Half>, FollowOf<double, double>,
                              FollowOf<double, float>};
  *sums = follows[kind](count, variables, forgetting, weight, threads);
}

// Returns the norm of all tensors together, of float or of double.
double keras_rmsprop_norm(bool is_double, int count, const int64_t* sizes,
                          const int64_t* places, int threads) {
  const auto norm = is_double ? NormOf<double> : NormOf<float>;
  return norm(count, sizes, places, threads);
}

}  // extern "C"

}  // namespace keras_rmsprop
