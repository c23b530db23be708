// TensorFlow's side of the kernel: its variables, its locks and its threads.

#include <algorithm>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

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
    .Input("learning_rate: T")
    .Input("correction: T")
    .Input("scale: T")
    .Input("constants: double")
    .Input("decays: double")
    .Attr("N: int >= 1")
    .Attr("M: int >= 0")
    .Attr("A: int >= 0")
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

namespace {

constexpr int64_t kBlockElements = 8192;  // what one thread does at a time
constexpr int64_t kCyclesAnElement = 4;

// Some elements of the tensor with a number.
struct Block {
  int tensor;
  int64_t start, size;
};

std::vector<Block> BlocksOf(const tf::OpInputList& tensors) {
  std::vector<Block> blocks;
  for (int i = 0; i < tensors.size(); ++i) {
    const int64_t size = tensors[i].NumElements();
    for (int64_t start = 0; start < size; start += kBlockElements) {
      blocks.push_back({i, start, std::min(kBlockElements, size - start)});
    }
  }
  return blocks;
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

// Holds the locks of variables, in the order of their addresses: so no two steps wait
// for each other.
class Locks {
 public:
  explicit Locks(std::vector<tf::mutex*> mutexes) : mutexes_(std::move(mutexes)) {
    for (tf::mutex* mutex : mutexes_) mutex->lock();
  }
  ~Locks() {
    for (tf::mutex* mutex : mutexes_) mutex->unlock();
  }
  Locks(const Locks&) = delete;
  Locks& operator=(const Locks&) = delete;

 private:
  std::vector<tf::mutex*> mutexes_;
};

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
    std::vector<tf::core::RefCountPtr<tf::Var>> variables;
    std::vector<std::string> names;
    int each_kind[4];
    const char* kinds[] = {"weights", "velocities", "momenta", "average_gradients"};
    for (int kind = 0; kind < 4; ++kind) {
      tf::OpInputList handles;
      OP_REQUIRES_OK(ctx, ctx->input_list(kinds[kind], &handles));
      each_kind[kind] = handles.size();
      OP_REQUIRES(ctx, handles.size() == count || (kind > 1 && handles.size() == 0),
                  absl::InvalidArgumentError(
                      absl::StrCat("There are ", count, " gradients and ",
                                   handles.size(), " ", kinds[kind], ".")));
      for (const tf::Tensor& tensor : handles) {
        const auto& handle = tensor.scalar<tf::ResourceHandle>()();
        tf::core::RefCountPtr<tf::Var> variable;
        OP_REQUIRES_OK(ctx, tf::LookupResource(ctx, handle, &variable));
        variables.push_back(std::move(variable));
        names.push_back(handle.name());
      }
    }
    Numbers<T> numbers;
    const tf::Tensor* decays;
    OP_REQUIRES_OK(ctx, ReadNumbers(ctx, count, &numbers, &decays));

    std::vector<tf::mutex*> mutexes;
    for (const auto& variable : variables) mutexes.push_back(variable->mu());
    std::sort(mutexes.begin(), mutexes.end());
    OP_REQUIRES(
        ctx, std::adjacent_find(mutexes.begin(), mutexes.end()) == mutexes.end(),
        absl::InvalidArgumentError("A variable is given twice."));
    Locks locks(std::move(mutexes));

    // Everything is checked before anything is written.
    for (size_t i = 0; i < variables.size(); ++i) {
      const bool is_weight = i < static_cast<size_t>(count);
      OP_REQUIRES_OK(ctx, Check(*variables[i], names[i],
                                is_weight ? tf::DataTypeToEnum<W>::v()
                                          : tf::DataTypeToEnum<T>::v(),
                                gradients[i % count].shape()));
    }
    for (const auto& variable : variables) {
      OP_REQUIRES_OK(ctx, MakeSoleOwner(ctx, variable->tensor()));
    }
    std::vector<Part<T, Kept>> parts(count);
    const T rate = lr_in_momentum_ ? numbers.rate_inside : numbers.rate_outside;
    for (int i = 0; i < count; ++i) {
      const T decay =
          decays->NumElements() ? static_cast<T>(decays->flat<double>()(i)) : T(0);
      parts[i] = {
          gradients[i].NumElements(),
          gradients[i].flat<T>().data(),
          reinterpret_cast<Kept*>(variables[i]->tensor()->flat<W>().data()),
          variables[count + i]->tensor()->flat<T>().data(),
          each_kind[2] ? variables[2 * count + i]->tensor()->flat<T>().data() : nullptr,
          each_kind[3] ? variables[variables.size() - count + i]
                             ->tensor()
                             ->flat<T>()
                             .data()
                       : nullptr,
          decoupled_ ? T(0) : decay,
          decoupled_ ? rate * decay : T(0),
      };
    }
    ForEach(ctx, BlocksOf(gradients), [&](int64_t, const Block& block) {
      Part<T, Kept> part = parts[block.tensor];
      part.size = block.size;
      part.gradient += block.start;
      part.weights += block.start;
      part.velocity += block.start;
      if (part.momentum) part.momentum += block.start;
      if (part.average_gradient) part.average_gradient += block.start;
      Step(numbers, part);
    });
  }

 private:
  // The arithmetic has types of its own for 16 bits, with the same bits.
  using Kept = std::conditional_t<
      std::is_same_v<W, tf::bfloat16>, Bfloat16,
      std::conditional_t<std::is_same_v<W, Eigen::half>, Half, W>>;

  absl::Status ReadNumbers(tf::OpKernelContext* ctx, int count, Numbers<T>* numbers,
                           const tf::Tensor** decays) {
    T scalars[3];
    const char* names[] = {"learning_rate", "correction", "scale"};
    for (int i = 0; i < 3; ++i) {
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
    return absl::OkStatus();
  }

  static absl::Status Check(tf::Var& variable, const std::string& name,
                            tf::DataType dtype, const tf::TensorShape& shape) {
    if (!variable.is_initialized) {
      return absl::FailedPreconditionError(
          absl::StrCat("Variable ", name, " is not initialized."));
    }
    const tf::Tensor& tensor = *variable.tensor();
    if (tensor.dtype() != dtype || tensor.shape() != shape) {
      return absl::InvalidArgumentError(absl::StrCat(
          "Variable ", name, " must be of dtype ",
          tf::DataTypeString(dtype), " and shape ", shape.DebugString(),
          ", as its gradient. Received: ", tf::DataTypeString(tensor.dtype()), ", ",
          tensor.shape().DebugString()));
    }
    return absl::OkStatus();
  }

  // Copies a variable's buffer if a reader still has it. The variable must be locked.
  // In copy-on-read mode readers have copies: they make them under the lock.
  static absl::Status MakeSoleOwner(tf::OpKernelContext* ctx, tf::Tensor* tensor) {
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
    const std::vector<Block> blocks = BlocksOf(tensors);
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
