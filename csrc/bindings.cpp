// pybind11 only: the names of latentwire_fast._C. The work is in placement.cpp and recurrent_prior.cpp.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "placement.h"
#include "recurrent_prior.h"

namespace py = pybind11;
using latentwire::Copies;
using latentwire::Placement;
using latentwire::Placer;
using latentwire::RecurrentPrior;

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

using Lists = std::vector<std::vector<int64_t>>;

std::vector<py::bytes> encode(const RecurrentPrior& prior, const Lists& symbols, const Lists& rest) {
  std::vector<std::string> messages;
  {
    const py::gil_scoped_release release;
    for (const auto& of_message : symbols) {
      messages.push_back(prior.encode(of_message, rest));
    }
  }
  return {messages.begin(), messages.end()};
}

Lists decode(const RecurrentPrior& prior, const std::vector<std::string>& messages, int64_t count,
             const Lists& rest) {
  const py::gil_scoped_release release;
  Lists found;
  for (const auto& message : messages) {
    found.push_back(prior.decode(message, count, rest));
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "K/V prefix placement (see csrc/placement.h), for latentwire_fast.readers.kv_placement; coding of payloads "
      "(see csrc/recurrent_prior.h), for latentwire_fast.wire.recurrent_prior.";

  // Raised with every change of what Python calls here: an extension from before it is not used.
  m.attr("INTERFACE") = 2;
  m.attr("CODING") = 1;  // as INTERFACE, of RecurrentPrior

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

  py::class_<RecurrentPrior>(m, "RecurrentPrior")
      .def(py::init([](int64_t rows, std::vector<int64_t> sizes, int64_t features, int64_t width,
                       const std::map<std::string, std::vector<int16_t>>& arrays, std::vector<int64_t> powers) {
        return RecurrentPrior({rows, std::move(sizes), features, width}, arrays, std::move(powers));
      }))
      .def("encode", &encode)
      .def("decode", &decode);
}
