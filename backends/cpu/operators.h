// What the files with torch.ops.tahf4_cpu share: tensors as the kernels read them, and the way to the general functions.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdlib>
#include <optional>

#include "common.h"

namespace tahf4 {

using at::IntArrayRef;
using at::ScalarType;
using at::Tensor;
using Optional = std::optional<Tensor>;

inline int number_of(ScalarType dtype) {
  return dtype == at::kFloat ? kFloat32 : dtype == at::kBFloat16 ? kBFloat16 : dtype == at::kHalf ? kFloat16 : -1;
}

inline int threads() { return at::get_num_threads(); }

// What is not taken here. The empty set of keys leads past the CPU's own function, this one, to the general one.
template <class Function, class... Given>
auto general(Function*, const char* name, const Given&... given) {
  const auto found = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  return found.template typed<Function>().redispatch(c10::DispatchKeySet(), given...);
}

constexpr int kRefused = -1;

// The set of instructions that the environment allows now, or kRefused: switched off, or named wrongly.
inline int instructions() {
  const char* off = std::getenv("TAHF4_NO_CPP");
  if (off && *off && std::strcmp(off, "0")) return kRefused;
  const char* wanted = std::getenv("TAHF4_CPU_ISA");
  const int found = tahf4_instruction_sets() | 1 << kNone;
  for (int isa = kAmx; isa >= kNone; --isa)
    if ((found >> isa & 1) && (!wanted || !*wanted || !std::strcmp(wanted, kSetNames[isa]))) return isa;
  return kRefused;
}

// float32 without holes, for what is read as it lies.
inline Optional plain(const Optional& values) {
  return values ? Optional(values->to(at::kFloat).contiguous()) : values;
}

inline const float* pointer(const Optional& values) { return values ? values->const_data_ptr<float>() : nullptr; }

inline bool readable(const Tensor& x) { return x.is_cpu() && number_of(x.scalar_type()) >= 0 && !x.is_neg(); }

// Of attention_operator.cpp.
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& mask, bool causal,
                 std::optional<double> scale, bool gqa);

}  // namespace tahf4
