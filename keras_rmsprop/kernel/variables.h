// TensorFlow's variables, as an op takes them: found, checked and locked together.

#ifndef KERAS_RMSPROP_VARIABLES_H_
#define KERAS_RMSPROP_VARIABLES_H_

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"

namespace keras_rmsprop {

namespace tf = tensorflow;

// Variables, and their names.
class Group : public tf::ResourceBase {
 public:
  // Returns the variables that handles name; or the group, if it is the handle of one.
  static absl::StatusOr<tf::core::RefCountPtr<Group>> Of(
      tf::OpKernelContext* ctx, const tf::OpInputList& handles) {
    static const uint64_t group_type = tf::TypeIndex::Make<Group>().hash_code();
    if (handles.size() == 1) {
      const auto& handle = handles[0].scalar<tf::ResourceHandle>()();
      if (handle.IsRefCounting() && handle.hash_code() == group_type) {
        TF_ASSIGN_OR_RETURN(Group * group, handle.GetResource<Group>());
        group->Ref();
        return tf::core::RefCountPtr<Group>(group);
      }
    }
    tf::core::RefCountPtr<Group> group(new Group);
    for (const tf::Tensor& tensor : handles) {
      const auto& handle = tensor.scalar<tf::ResourceHandle>()();
      tf::core::RefCountPtr<tf::Var> variable;
      TF_RETURN_IF_ERROR(tf::LookupResource(ctx, handle, &variable));
      group->variables_.push_back(std::move(variable));
      group->names_.push_back(handle.name());
    }
    return group;
  }

  std::string DebugString() const override {
    return absl::StrCat(size(), " variables");
  }

  int size() const { return static_cast<int>(variables_.size()); }
  tf::Var& variable(int i) const { return *variables_[i]; }
  const std::string& name(int i) const { return names_[i]; }

 private:
  std::vector<tf::core::RefCountPtr<tf::Var>> variables_;
  std::vector<std::string> names_;
};

// Variables of several kinds, one of each kind for each gradient, or none of a kind.
class Variables {
 public:
  // Finds the variables that these inputs of an op name.
  absl::Status Find(tf::OpKernelContext* ctx, int count,
                    const std::vector<const char*>& kinds, int needed) {
    for (const char* kind : kinds) {
      tf::OpInputList handles;
      TF_RETURN_IF_ERROR(ctx->input_list(kind, &handles));
      TF_ASSIGN_OR_RETURN(auto group, Group::Of(ctx, handles));
      const bool may_be_none = kinds_.size() >= static_cast<size_t>(needed);
      if (group->size() != count && !(may_be_none && group->size() == 0)) {
        return absl::InvalidArgumentError(absl::StrCat(
            "There are ", count, " gradients and ", group->size(), " ", kind, "."));
      }
      kinds_.push_back(std::move(group));
    }
    return absl::OkStatus();
  }

  // Locks all, in the order of their addresses: so no two steps wait for each other.
  absl::Status Lock() {
    for (const auto& group : kinds_) {
      for (int i = 0; i < group->size(); ++i) {
        mutexes_.push_back(group->variable(i).mu());
      }
    }
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

  bool Has(int kind) const { return kinds_[kind]->size() > 0; }
  tf::Tensor* Get(int kind, int i) { return kinds_[kind]->variable(i).tensor(); }

  // Where the elements of one are; null if there is none of that kind.
  template <typename T>
  T* Data(int kind, int i) {
    return Has(kind) ? Get(kind, i)->template flat<T>().data() : nullptr;
  }

  absl::Status Check(int kind, int i, tf::DataType dtype,
                     const tf::TensorShape* shape) {
    tf::Var& variable = kinds_[kind]->variable(i);
    const std::string& name = kinds_[kind]->name(i);
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
  absl::Status MakeSoleOwnerOfAll(tf::OpKernelContext* ctx) {
    for (int kind = 0; kind < static_cast<int>(kinds_.size()); ++kind) {
      for (int i = 0; i < kinds_[kind]->size(); ++i) {
        TF_RETURN_IF_ERROR(MakeSoleOwner(ctx, kind, i));
      }
    }
    return absl::OkStatus();
  }

 private:
  std::vector<tf::core::RefCountPtr<Group>> kinds_;
  std::vector<tf::mutex*> mutexes_;
};

}  // namespace keras_rmsprop

#endif  // KERAS_RMSPROP_VARIABLES_H_
