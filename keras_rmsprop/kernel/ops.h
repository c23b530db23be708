// What the ops of the kernel have in common: threads, types, and the numbers of a step.

#ifndef KERAS_RMSPROP_OPS_H_
#define KERAS_RMSPROP_OPS_H_

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "step.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/util/work_sharder.h"
#include "variables.h"

namespace keras_rmsprop {

constexpr int64_t kCyclesAnElement = 1;
constexpr int64_t kCyclesAThread = 1 << 17;  // with fewer, to wake it takes longer

// Does something for all pieces, on TensorFlow's own threads. Each takes those of its
// share, then what is left of others: nobody waits for a thread that wakes late. Shares
// are in one piece, as threads that write side by side take lines from each other.
template <typename Function>
void ForEach(tf::OpKernelContext* ctx, const std::vector<Piece>& pieces,
             const Function& function, int64_t cycles_each = kCyclesAnElement) {
  int64_t size = 0;
  for (const Piece& piece : pieces) size += piece.size;
  const auto* workers = ctx->device()->tensorflow_cpu_worker_threads();
  const int64_t wanted = std::min<int64_t>(
      {workers->num_threads, tf::GetPerThreadMaxParallelism(),
       cycles_each * size / kCyclesAThread});
  const int64_t threads = std::max<int64_t>(wanted, 1), count = pieces.size();
  struct Progress {
    explicit Progress(int64_t threads) : next(threads) {}
    std::vector<std::atomic<int64_t>> next;  // of each share
    std::atomic<int64_t> done{0};
  };
  const auto progress = std::make_shared<Progress>(threads);
  for (int64_t i = 0; i < threads; ++i) progress->next[i] = count * i / threads;
  const auto take = [&function, &pieces, progress, threads, count](int64_t first) {
    for (int64_t j = first; j < first + threads; ++j) {
      const int64_t share = j % threads, end = count * (share + 1) / threads;
      for (int64_t i; (i = progress->next[share]++) < end; ++progress->done) {
        function(i, pieces[i]);
      }
    }
  };
  for (int64_t i = 1; i < threads; ++i) {
    workers->workers->Schedule([take, i] { take(i); });
  }
  take(0);
  while (progress->done < count) std::this_thread::yield();
}

// The arithmetic has types of its own for 16 bits and for pieces, with the same bits.
template <typename W>
using Plain = std::conditional_t<
    std::is_same_v<W, tf::bfloat16>, Bfloat16,
    std::conditional_t<std::is_same_v<W, Eigen::half>, Half,
                       std::conditional_t<std::is_same_v<W, uint8_t>, Coded, W>>>;

inline absl::Status ReadScalar(tf::OpKernelContext* ctx, const char* name,
                               const tf::Tensor** scalar) {
  TF_RETURN_IF_ERROR(ctx->input(name, scalar));
  if ((*scalar)->NumElements() != 1) {
    return absl::InvalidArgumentError(absl::StrCat(name, " must be a scalar."));
  }
  return absl::OkStatus();
}

// What the ops have in common that take a step: its numbers.
template <typename T>
class UpdateOp : public tf::OpKernel {
 public:
  explicit UpdateOp(tf::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("epsilon_inside_sqrt", &epsilon_inside_sqrt_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("nesterov", &nesterov_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("lr_in_momentum", &lr_in_momentum_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("decoupled_weight_decay", &decoupled_));
  }

 protected:
  // Reads what is asked for, and the weight decay of each variable.
  absl::Status Read(tf::OpKernelContext* ctx, int count, Request* request,
                    const tf::Tensor** decays) {
    const tf::Tensor *rate, *correction, *scale, *constants;
    TF_RETURN_IF_ERROR(ReadScalar(ctx, "learning_rate", &rate));
    TF_RETURN_IF_ERROR(ReadScalar(ctx, "correction", &correction));
    TF_RETURN_IF_ERROR(ReadScalar(ctx, "scale", &scale));
    TF_RETURN_IF_ERROR(ctx->input("constants", &constants));
    TF_RETURN_IF_ERROR(ctx->input("decays", decays));
    if (constants->NumElements() != 3 ||
        ((*decays)->NumElements() != 0 && (*decays)->NumElements() != count)) {
      return absl::InvalidArgumentError(
          "There must be three constants, and a decay for each gradient or none.");
    }
    const auto constant = constants->flat<double>();
    *request = {};
    request->scale = scale->flat<T>()(0);
    request->learning_rate = rate->flat<T>()(0);
    request->rho = constant(0);
    request->momentum = constant(1);
    request->epsilon = constant(2);
    request->correction = correction->flat<T>()(0);
    request->epsilon_inside_sqrt = epsilon_inside_sqrt_;
    request->nesterov = nesterov_;
    request->lr_in_momentum = lr_in_momentum_;
    request->decoupled_weight_decay = decoupled_;
    return absl::OkStatus();
  }

  // Returns the weight decay of a variable.
  static Decay<T> DecayOf(const Request& request, const tf::Tensor& decays, int i) {
    return {request, decays.NumElements() ? decays.flat<double>()(i) : 0};
  }

 private:
  bool epsilon_inside_sqrt_, nesterov_, lr_in_momentum_, decoupled_;
};

}  // namespace keras_rmsprop

#endif  // KERAS_RMSPROP_OPS_H_
