// TensorFlow's side of the kernel: its variables, its locks and its threads.

#include <algorithm>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "search.h"
#include "step.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/util/work_sharder.h"

namespace keras_rmsprop {

namespace tf = tensorflow;

REGISTER_OP("KerasRmspropStep")
    .Doc("One step of RMSprop, of all variables of one dtype.")
    .Input("gradients: N * T")
    .Input("weights: N * resource")
    .Input("velocities: N * resource")
    .Input("momenta: M * resource")
    .Input("average_gradients: A * resource")
    .Input("averages: E * resource")
    .Input("learning_rate: T")
    .Input("correction: T")
    .Input("scale: T")
    .Input("share: T")
    .Input("constants: double")
    .Input("decays: double")
    .Attr("N: int >= 1")
    .Attr("M: int >= 0")
    .Attr("A: int >= 0")
    .Attr("E: int >= 0")
    .Attr("T: {float, double}")
    .Attr("W: {float, double, bfloat16, half}")
    .Attr("epsilon_inside_sqrt: bool")
    .Attr("nesterov: bool")
    .Attr("lr_in_momentum: bool")
    .Attr("decoupled_weight_decay: bool")
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::NoOutputs);

REGISTER_OP("KerasRmspropSquares")
    .Doc("The sum of the squares of each tensor; the same sum with any threads.")
    .Input("tensors: N * T")
    .Output("squares: double")
    .Attr("N: int >= 1")
    .Attr("T: {float, double}")
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) {
      c->set_output(0, c->Vector(c->num_inputs()));
      return absl::OkStatus();
    });

REGISTER_OP("KerasRmspropFollow")
    .Doc("The sums by which the search for a learning rate goes; see automatic.py.")
    .Input("gradients: N * T")
    .Input("weights: N * resource")
    .Input("first_weights: N * resource")
    .Input("gradient_sums: N * resource")
    .Input("forgetting: T")
    .Input("weight: T")
    .Input("begins: bool")
    .Output("gains: double")
    .Output("lengths: double")
    .Attr("N: int >= 1")
    .Attr("T: {float, double}")
    .Attr("W: {float, double, bfloat16, half}")
    .Attr("samples: list(int)")  // run, pitch and stride of each
    .SetIsStateful()
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) {
      int count;
      TF_RETURN_IF_ERROR(c->GetAttr("N", &count));
      c->set_output(0, c->Vector(count));
      c->set_output(1, c->Vector(count));
      return absl::OkStatus();
    });

namespace {

constexpr int64_t kBlockElements = 8192;  // what one thread does at a time
constexpr int64_t kCyclesAnElement = 4;

// Some elements of the tensor with a number.
struct Block {
  int tensor;
  int64_t start, size;
};

std::vector<Block> BlocksOf(const std::vector<int64_t>& sizes) {
  std::vector<Block> blocks;
  for (int i = 0; i < static_cast<int>(sizes.size()); ++i) {
    const int64_t size = sizes[i];
    for (int64_t start = 0; start < size; start += kBlockElements) {
      blocks.push_back({i, start, std::min(kBlockElements, size - start)});
    }
  }
  return blocks;
}

std::vector<int64_t> SizesOf(const tf::OpInputList& tensors) {
  std::vector<int64_t> sizes;
  for (const tf::Tensor& tensor : tensors) sizes.push_back(tensor.NumElements());
  return sizes;
}

// Does something for all blocks, on TensorFlow's own threads.
template <typename Function>
void ForEach(tf::OpKernelContext* ctx, const std::vector<Block>& blocks,
             Function function) {
  if (blocks.empty()) return;
  int64_t elements = 0;
  for (const Block& block : blocks) elements += block.size;
  const auto* workers = ctx->device()->tensorflow_cpu_worker_threads();
  tf::Shard(workers->num_threads, workers->workers, blocks.size(),
            kCyclesAnElement * elements / blocks.size() + 1,
            [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) function(i, blocks[i]);
            });
}

// Variables of several kinds, one of each kind for each gradient, or none of a kind.
class Variables {
 public:
  // Finds the variables that these inputs of an op name.
  absl::Status Find(tf::OpKernelContext* ctx, int count,
                    const std::vector<const char*>& kinds, int needed) {
    for (const char* kind : kinds) {
      tf::OpInputList handles;
      TF_RETURN_IF_ERROR(ctx->input_list(kind, &handles));
      const bool may_be_none = first_.size() >= static_cast<size_t>(needed);
      if (handles.size() != count && !(may_be_none && handles.size() == 0)) {
        return absl::InvalidArgumentError(absl::StrCat(
            "There are ", count, " gradients and ", handles.size(), " ", kind, "."));
      }
      first_.push_back(handles.size() ? static_cast<int>(variables_.size()) : -1);
      for (const tf::Tensor& tensor : handles) {
        const auto& handle = tensor.scalar<tf::ResourceHandle>()();
        tf::core::RefCountPtr<tf::Var> variable;
        TF_RETURN_IF_ERROR(tf::LookupResource(ctx, handle, &variable));
        variables_.push_back(std::move(variable));
        names_.push_back(handle.name());
      }
    }
    return absl::OkStatus();
  }

  // Locks all, in the order of their addresses: so no two steps wait for each other.
  absl::Status Lock() {
    for (const auto& variable : variables_) mutexes_.push_back(variable->mu());
    std::sort(mutexes_.begin(), mutexes_.end());
    if (std::adjacent_find(mutexes_.begin(), mutexes_.end()) != mutexes_.end()) {
      mutexes_.clear();
      return absl::InvalidArgumentError("A variable is given twice.");
    }
    for (tf::mutex* mutex : mutexes_) mutex->lock();
    return absl::OkStatus();
  }

  Variables() = default;
  ~Variables() {
    for (tf::mutex* mutex : mutexes_) mutex->unlock();
  }
  Variables(const Variables&) = delete;
  Variables& operator=(const Variables&) = delete;

  bool Has(int kind) const { return first_[kind] >= 0; }
  tf::Tensor* Get(int kind, int i) { return variables_[first_[kind] + i]->tensor(); }

  // Where the elements of one are; null if there is none of that kind.
  template <typename T>
  T* Data(int kind, int i) {
    return Has(kind) ? Get(kind, i)->template flat<T>().data() : nullptr;
  }

  absl::Status Check(int kind, int i, tf::DataType dtype,
                     const tf::TensorShape* shape) {
    tf::Var& variable = *variables_[first_[kind] + i];
    const std::string& name = names_[first_[kind] + i];
    if (!variable.is_initialized) {
      return absl::FailedPreconditionError(
          absl::StrCat("Variable ", name, " is not initialized."));
    }
    const tf::Tensor& tensor = *variable.tensor();
    if (tensor.dtype() != dtype || (shape && tensor.shape() != *shape)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "Variable ", name, " must be of dtype ", tf::DataTypeString(dtype),
          shape ? absl::StrCat(" and shape ", shape->DebugString(), ", as its gradient")
                : "",
          ". Received: ", tf::DataTypeString(tensor.dtype()), ", ",
          tensor.shape().DebugString()));
    }
    return absl::OkStatus();
  }

  // Copies a locked variable's buffer if a reader still has it. In copy-on-read mode
  // readers have copies: they make them under the lock.
  absl::Status MakeSoleOwner(tf::OpKernelContext* ctx, int kind, int i) {
    tf::Tensor* tensor = Get(kind, i);
    if (tensor->RefCountIsOne()) return absl::OkStatus();
    tf::Tensor copy;
    tf::AllocatorAttributes attributes;
    attributes.set_gpu_compatible(true);
    TF_RETURN_IF_ERROR(
        ctx->allocate_temp(tensor->dtype(), tensor->shape(), &copy, attributes));
    const auto from = tensor->tensor_data();
    std::copy(from.begin(), from.end(), static_cast<char*>(copy.data()));
    *tensor = copy;
    return absl::OkStatus();
  }

 private:
  std::vector<tf::core::RefCountPtr<tf::Var>> variables_;
  std::vector<std::string> names_;
  std::vector<int> first_;  // of each kind; -1: there is none
  std::vector<tf::mutex*> mutexes_;
};

// The arithmetic has types of its own for 16 bits, with the same bits.
template <typename W>
using Plain = std::conditional_t<
    std::is_same_v<W, tf::bfloat16>, Bfloat16,
    std::conditional_t<std::is_same_v<W, Eigen::half>, Half, W>>;

template <typename T, typename W>
class StepOp : public tf::OpKernel {
 public:
  explicit StepOp(tf::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("epsilon_inside_sqrt", &epsilon_inside_sqrt_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("nesterov", &nesterov_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("lr_in_momentum", &lr_in_momentum_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("decoupled_weight_decay", &decoupled_));
  }

  void Compute(tf::OpKernelContext* ctx) override {
    tf::OpInputList gradients;
    OP_REQUIRES_OK(ctx, ctx->input_list("gradients", &gradients));
    const int count = gradients.size();
    Variables variables;
    OP_REQUIRES_OK(ctx, variables.Find(ctx, count,
                                       {"weights", "velocities", "momenta",
                                        "average_gradients", "averages"},
                                       2));
    Numbers<T> numbers;
    const tf::Tensor* decays;
    OP_REQUIRES_OK(ctx, ReadNumbers(ctx, count, &numbers, &decays));
    OP_REQUIRES(ctx, !variables.Has(kAverages) || (std::is_same_v<T, W>),
                absl::InvalidArgumentError("Averages need weights in full precision."));

    // Everything is checked before anything is written.
    OP_REQUIRES_OK(ctx, variables.Lock());
    const tf::DataType of_weights = tf::DataTypeToEnum<W>::v();
    const tf::DataType of_slots = tf::DataTypeToEnum<T>::v();
    for (int kind = 0; kind < kKinds; ++kind) {
      for (int i = 0; variables.Has(kind) && i < count; ++i) {
        OP_REQUIRES_OK(
            ctx, variables.Check(kind, i, kind == kWeights ? of_weights : of_slots,
                                 &gradients[i].shape()));
      }
    }
    for (int kind = 0; kind < kKinds; ++kind) {
      for (int i = 0; variables.Has(kind) && i < count; ++i) {
        OP_REQUIRES_OK(ctx, variables.MakeSoleOwner(ctx, kind, i));
      }
    }
    std::vector<Part<T, Plain<W>>> parts(count);
    const T rate = lr_in_momentum_ ? numbers.rate_inside : numbers.rate_outside;
    for (int i = 0; i < count; ++i) {
      const T decay =
          decays->NumElements() ? static_cast<T>(decays->flat<double>()(i)) : T(0);
      parts[i] = {
          gradients[i].NumElements(),
          gradients[i].flat<T>().data(),
          reinterpret_cast<Plain<W>*>(variables.Data<W>(kWeights, i)),
          variables.Data<T>(kVelocities, i),
          variables.Data<T>(kMomenta, i),
          variables.Data<T>(kAverageGradients, i),
          decoupled_ ? T(0) : decay,
          decoupled_ ? rate * decay : T(0),
          variables.Data<T>(kAverages, i),
      };
    }
    ForEach(ctx, BlocksOf(SizesOf(gradients)), [&](int64_t, const Block& block) {
      Part<T, Plain<W>> part = parts[block.tensor];
      part.size = block.size;
      part.gradient += block.start;
      part.weights += block.start;
      part.velocity += block.start;
      if (part.momentum) part.momentum += block.start;
      if (part.average_gradient) part.average_gradient += block.start;
      if (part.average) part.average += block.start;
      Step(numbers, part);
    });
  }

 private:
  enum { kWeights, kVelocities, kMomenta, kAverageGradients, kAverages, kKinds };

  absl::Status ReadNumbers(tf::OpKernelContext* ctx, int count, Numbers<T>* numbers,
                           const tf::Tensor** decays) {
    T scalars[4];
    const char* names[] = {"learning_rate", "correction", "scale", "share"};
    for (int i = 0; i < 4; ++i) {
      const tf::Tensor* scalar;
      TF_RETURN_IF_ERROR(ctx->input(names[i], &scalar));
      if (scalar->NumElements() != 1) {
        return absl::InvalidArgumentError(absl::StrCat(names[i], " must be a scalar."));
      }
      scalars[i] = scalar->flat<T>()(0);
    }
    const tf::Tensor* constants;
    TF_RETURN_IF_ERROR(ctx->input("constants", &constants));
    TF_RETURN_IF_ERROR(ctx->input("decays", decays));
    if (constants->NumElements() != 3 ||
        ((*decays)->NumElements() != 0 && (*decays)->NumElements() != count)) {
      return absl::InvalidArgumentError(
          "There must be three constants, and a decay for each gradient or none.");
    }
    const auto constant = constants->flat<double>();
    const T epsilon = static_cast<T>(constant(2));
    numbers->scale = scalars[2];
    numbers->rho = static_cast<T>(constant(0));
    numbers->rest = static_cast<T>(1 - constant(0));
    numbers->momentum = static_cast<T>(constant(1));
    numbers->epsilon_inside = epsilon_inside_sqrt_ ? epsilon : T(0);
    numbers->epsilon_outside = epsilon_inside_sqrt_ ? T(0) : epsilon;
    numbers->correction = scalars[1];
    numbers->rate_inside = lr_in_momentum_ ? scalars[0] : T(1);
    numbers->rate_outside = lr_in_momentum_ ? T(1) : scalars[0];
    numbers->nesterov = nesterov_;
    numbers->share = scalars[3];
    return absl::OkStatus();
  }

  bool epsilon_inside_sqrt_, nesterov_, lr_in_momentum_, decoupled_;
};

template <typename T>
class SquaresOp : public tf::OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(tf::OpKernelContext* ctx) override {
    tf::OpInputList tensors;
    OP_REQUIRES_OK(ctx, ctx->input_list("tensors", &tensors));
    tf::Tensor* squares;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, {tensors.size()}, &squares));
    const std::vector<Block> blocks = BlocksOf(SizesOf(tensors));
    std::vector<double> sums(blocks.size());
    ForEach(ctx, blocks, [&](int64_t i, const Block& block) {
      const T* x = tensors[block.tensor].flat<T>().data();
      sums[i] = Squares(x + block.start, block.size);
    });
    auto of_each = squares->flat<double>();
    of_each.setZero();
    for (size_t i = 0; i < blocks.size(); ++i) of_each(blocks[i].tensor) += sums[i];
  }
};

template <typename T, typename W>
class FollowOp : public tf::OpKernel {
 public:
  explicit FollowOp(tf::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("samples", &samples_));
  }

  void Compute(tf::OpKernelContext* ctx) override {
    tf::OpInputList gradients;
    OP_REQUIRES_OK(ctx, ctx->input_list("gradients", &gradients));
    const int count = gradients.size();
    Variables variables;
    OP_REQUIRES_OK(
        ctx, variables.Find(ctx, count, {"weights", "first_weights", "gradient_sums"},
                            kKinds));
    const tf::Tensor *forgetting, *weight, *begins;
    OP_REQUIRES_OK(ctx, ctx->input("forgetting", &forgetting));
    OP_REQUIRES_OK(ctx, ctx->input("weight", &weight));
    OP_REQUIRES_OK(ctx, ctx->input("begins", &begins));
    OP_REQUIRES(ctx,
                forgetting->NumElements() == 1 && weight->NumElements() == 1 &&
                    begins->NumElements() == 1 &&
                    samples_.size() == 3 * static_cast<size_t>(count),
                absl::InvalidArgumentError("There must be a weight, and a sample for "
                                           "each gradient."));
    tf::Tensor *gains, *lengths;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, {count}, &gains));
    OP_REQUIRES_OK(ctx, ctx->allocate_output(1, {count}, &lengths));

    OP_REQUIRES_OK(ctx, variables.Lock());
    std::vector<Followed<T, Plain<W>>> parts(count);
    std::vector<int64_t> sizes(count);
    for (int i = 0; i < count; ++i) {
      OP_REQUIRES_OK(ctx, variables.Check(kWeights, i, tf::DataTypeToEnum<W>::v(),
                                          &gradients[i].shape()));
      OP_REQUIRES_OK(
          ctx, variables.Check(kSums, i, tf::DataTypeToEnum<T>::v(), nullptr));
      OP_REQUIRES_OK(ctx, variables.Check(kFirst, i, tf::DataTypeToEnum<T>::v(),
                                          nullptr));
      const Sample sample = {samples_[3 * i], samples_[3 * i + 1], samples_[3 * i + 2]};
      sizes[i] = variables.Get(kSums, i)->NumElements();
      OP_REQUIRES(ctx,
                  sizes[i] == variables.Get(kFirst, i)->NumElements() &&
                      Fits(sample, sizes[i], gradients[i].NumElements()),
                  absl::InvalidArgumentError(absl::StrCat(
                      "Gradient ", i, " has not the elements that are looked at.")));
    }
    const bool at_first = begins->flat<bool>()(0);
    for (int i = 0; i < count; ++i) {
      OP_REQUIRES_OK(ctx, variables.MakeSoleOwner(ctx, kSums, i));
      if (at_first) OP_REQUIRES_OK(ctx, variables.MakeSoleOwner(ctx, kFirst, i));
      parts[i] = {
          {samples_[3 * i], samples_[3 * i + 1], samples_[3 * i + 2]},
          gradients[i].flat<T>().data(),
          reinterpret_cast<Plain<W>*>(variables.Data<W>(kWeights, i)),
          variables.Data<T>(kFirst, i),
          variables.Data<T>(kSums, i),
      };
    }
    const std::vector<Block> blocks = BlocksOf(sizes);
    std::vector<Sums> sums(blocks.size());
    ForEach(ctx, blocks, [&](int64_t i, const Block& block) {
      sums[i] = Follow(parts[block.tensor], block.start, block.size,
                       forgetting->flat<T>()(0), weight->flat<T>()(0), at_first);
    });
    auto gain = gains->flat<double>(), length = lengths->flat<double>();
    gain.setZero();
    length.setZero();
    for (size_t i = 0; i < blocks.size(); ++i) {
      gain(blocks[i].tensor) += sums[i].gain;
      length(blocks[i].tensor) += sums[i].length;
    }
  }

 private:
  enum { kWeights, kFirst, kSums, kKinds };

  // Whether `size` elements in whole runs are all among so many.
  static bool Fits(const Sample& sample, int64_t size, int64_t elements) {
    if (size == 0) return true;
    const auto [run, pitch, stride] = sample;
    if (run < 1 || pitch < 1 || stride < 1 || size % run) return false;
    return (size / run - 1) * pitch + (run - 1) * stride < elements;
  }

  std::vector<int64_t> samples_;
};

#define REGISTER_FOLLOW(T, W)                         \
  REGISTER_KERNEL_BUILDER(Name("KerasRmspropFollow")  \
                              .Device(tf::DEVICE_CPU) \
                              .TypeConstraint<T>("T") \
                              .TypeConstraint<W>("W"), \
                          FollowOp<T, W>)
REGISTER_FOLLOW(float, float);
REGISTER_FOLLOW(float, tf::bfloat16);
REGISTER_FOLLOW(float, Eigen::half);
REGISTER_FOLLOW(double, double);
REGISTER_FOLLOW(double, float);

#define REGISTER_STEP(T, W)                                        \
  REGISTER_KERNEL_BUILDER(Name("KerasRmspropStep")                 \
                              .Device(tf::DEVICE_CPU)              \
                              .TypeConstraint<T>("T")              \
                              .TypeConstraint<W>("W"),             \
                          StepOp<T, W>)
REGISTER_STEP(float, float);
REGISTER_STEP(float, tf::bfloat16);
REGISTER_STEP(float, Eigen::half);
REGISTER_STEP(double, double);
REGISTER_STEP(double, float);

#define REGISTER_SQUARES(T)                                                         \
  REGISTER_KERNEL_BUILDER(                                                          \
      Name("KerasRmspropSquares").Device(tf::DEVICE_CPU).TypeConstraint<T>("T"), \
      SquaresOp<T>)
REGISTER_SQUARES(float);
REGISTER_SQUARES(double);

}  // namespace
}  // namespace keras_rmsprop
