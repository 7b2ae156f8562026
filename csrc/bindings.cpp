// pybind11 only: the names of latentwire_fast._C. The work is in placement.cpp.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "placement.h"

namespace {

using Runs = std::vector<std::pair<int64_t, int64_t>>;

std::vector<std::pair<std::string, Runs>> plan(const std::vector<std::string>& layer_devices) {
  std::vector<std::pair<std::string, Runs>> result;
  for (const auto& entry : latentwire::plan(layer_devices)) {
    Runs runs;
    for (const auto& run : entry.runs) {
      runs.emplace_back(run.first, run.count);
    }
    result.emplace_back(entry.device.str(), std::move(runs));
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "K/V prefix placement (see csrc/placement.h); use it through latentwire_fast.placement.";
  m.def("plan", torch::wrap_pybind_function(plan), pybind11::arg("layer_devices"));
}
