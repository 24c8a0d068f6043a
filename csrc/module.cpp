// The compiled module `rmm_kernels._C`: build info and CPU features. Loading it registers the CPU kernels with torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"

namespace rmm {
namespace {

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx512) return avx512;
  if (isa == Isa::avx512_bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return isa == Isa::baseline;
}

const std::vector<std::pair<std::string, Isa>> kNames{
    {"baseline", Isa::baseline}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}, {"avx512_bf16", Isa::avx512_bf16}};

Isa best() {
  Isa found = Isa::baseline;
  for (const auto& [known, value] : kNames) {
    if (supported(value)) found = value;
  }
  return found;
}

Isa current = best();

std::string name(Isa isa) {
  for (const auto& [known, value] : kNames) {
    if (value == isa) return known;
  }
  return "unknown";
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto& [known, value] : kNames) {
    if (supported(value)) names.push_back(known);
  }
  return names;
}

std::string use_instruction_set(const std::string& wanted) {
  const auto found = std::find_if(kNames.begin(), kNames.end(), [&](const auto& one) { return one.first == wanted; });
  if (found == kNames.end() || !supported(found->second)) {
    std::string allowed;
    for (const auto& known : instruction_sets()) allowed += (allowed.empty() ? "" : ", ") + known;
    throw std::invalid_argument("instruction set '" + wanted + "' is not one this CPU has; allowed are " + allowed);
  }
  const std::string previous = name(current);
  current = found->second;
  return previous;
}

pybind11::dict build_info() {
  using namespace pybind11::literals;
  return pybind11::dict("compiler"_a = __VERSION__, "torch_target"_a = "2.10", "instruction_set"_a = name(current),
                        "instruction_sets"_a = instruction_sets(), "cuda"_a = RMM_CUDA);
}

}  // namespace

Isa isa() { return current; }

}  // namespace rmm

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of rmm_kernels; importing it registers the CPU kernels with torch.";
  m.def("build_info", &rmm::build_info, "How this module was built and which instruction set its kernels use.");
  m.def("use_instruction_set", &rmm::use_instruction_set, pybind11::arg("name"),
        "Make the kernels of this process use another instruction set that the CPU has; returns the one used before. "
        "For tests and benchmarks: not to be called while an op runs.");
  m.def("force_restored", &rmm::force_restored, pybind11::arg("tokens"),
        "Make the LoRA forward restore a task's factors from so many tokens on; 0: as it chooses. Returns what was set before. "
        "For tests and benchmarks: results keep every bit.");
}
