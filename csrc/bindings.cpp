// pybind11 only: the names of latentwire_fast._C. The work is in placement.cpp.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "placement.h"

namespace py = pybind11;
using latentwire::Copies;
using latentwire::Placement;
using latentwire::Placer;

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
  m.doc() = "K/V prefix placement (see csrc/placement.h); use it through latentwire_fast.readers.kv_placement.";

  // Raised with every change of what Python calls here: an extension from before it is not used.
  m.attr("INTERFACE") = 2;

  m.def("plan", torch::wrap_pybind_function(plan), py::arg("layer_devices"));

  py::class_<Copies>(m, "Copies")
      .def_readonly("prepare", &Copies::prepare)
      .def_readonly("link", &Copies::link)
      .def_readonly("scatter", &Copies::scatter);

  // The GIL is released while tensors are copied, and while views are made. It is held in what changes a
  // placement's own lists and is short: two threads may wait for one placement.
  py::class_<Placement>(m, "Placement")
      .def("layers", torch::wrap_pybind_function_no_gil(&Placement::layers))
      .def("scatter", torch::wrap_pybind_function_no_gil(&Placement::scatter))
      .def("wait", torch::wrap_pybind_function(&Placement::wait))
      .def("wait_for_layer", torch::wrap_pybind_function(&Placement::wait_for_layer))
      .def("is_under_way", torch::wrap_pybind_function(&Placement::is_under_way))
      .def_property_readonly("copies", &Placement::copies);

  py::class_<Placer>(m, "Placer")
      .def(py::init(torch::wrap_pybind_function(
          [](const std::vector<std::string>& layer_devices, at::ScalarType dtype) {
            return Placer(layer_devices, dtype);
          })))
      .def("place", torch::wrap_pybind_function_no_gil(&Placer::place));
}
