#include "placement.h"

#include <c10/util/Exception.h>

#include <algorithm>

namespace latentwire {
namespace {

c10::Device parse_device(const std::string& name, size_t layer) {
  TORCH_CHECK_VALUE(
      name != "disk" && name != "meta",
      "layer ", layer, " is on '", name, "', which holds no memory to place a prefix in; ",
      "load the reader with that layer on a device");
  try {
    return c10::Device(name);
  } catch (const c10::Error&) {
    TORCH_CHECK_VALUE(
        false, "layer ", layer, " is on '", name, "', which is not a device; ",
        "name one such as 'cpu' or 'cuda:0'");
  }
}

}  // namespace

std::vector<DeviceRuns> plan(const std::vector<std::string>& layer_devices) {
  TORCH_CHECK_VALUE(!layer_devices.empty(), "the device map names no layer");
  std::vector<DeviceRuns> devices;
  for (size_t layer = 0; layer < layer_devices.size(); ++layer) {
    const c10::Device device = parse_device(layer_devices[layer], layer);
    auto found = std::find_if(devices.begin(), devices.end(), [&](const DeviceRuns& entry) {
      return entry.device == device;
    });
    if (found == devices.end()) {
      devices.push_back({device, {}});
      found = std::prev(devices.end());
    }
    const auto index = static_cast<int64_t>(layer);
    auto& runs = found->runs;
    if (!runs.empty() && runs.back().first + runs.back().count == index) {
      ++runs.back().count;
    } else {
      runs.push_back({index, 1});
    }
  }
  return devices;
}

}  // namespace latentwire
