// Where each layer of a reader's K/V cache lives, and moving a prefix there.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <string>
#include <vector>

namespace latentwire {

// The layers [first, first + count) of one device.
struct Run {
  int64_t first;
  int64_t count;
};

// What one device holds: contiguous runs of layers, in ascending order.
struct DeviceRuns {
  c10::Device device;
  std::vector<Run> runs;
};

// Groups a layer -> device map by device, devices in the order of their first layer. Adjacent layers
// of one device make one run; an odd map (0, 1, 0) gives a device several.
// Throws c10::ValueError for an empty map, a name that is no device, and `meta` or `disk`, which hold no
// memory to copy to.
std::vector<DeviceRuns> plan(const std::vector<std::string>& layer_devices);

}  // namespace latentwire
