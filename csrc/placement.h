// Moving one K/V prefix to the devices that a reader's layers live on.
//
// A prefix is one tensor [L, 2, B, H, P, D]: layers, keys and values, batch (or 1, broadcast), key/value
// heads, positions, head width. A slab is the part of it that one device holds, [l, 2, B, H, P, D].
//
// Only device-generic interfaces of c10 are used (VirtualGuardImpl, Stream, Event), so that one source
// serves CPU and CUDA builds of torch and needs no CUDA headers. Every argument that is wrong throws
// c10::ValueError (ValueError in Python).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "host_pool.h"

namespace latentwire {

// The layers [first, first + count).
struct Run {
  int64_t first;
  int64_t count;
};

// What one device holds: runs of adjacent layers, in ascending order.
struct DeviceRuns {
  c10::Device device;
  std::vector<Run> runs;
};

// Groups a layer -> device map by device, devices in the order of their first layer. Adjacent layers of
// one device make one run; an odd map (0, 1, 0) gives a device several. Refuses an empty map, a name that
// is no device, an accelerator without its index, and `meta` and `disk`, which hold no memory.
std::vector<DeviceRuns> plan(const std::vector<std::string>& layer_devices);

// How often K/V data was copied: while it was made ready where it was produced (gathered by device, cast,
// pinned: one pass for all), over a link (one copy for each part), and into a static cache.
struct Copies {
  int64_t prepare = 0;
  int64_t link = 0;
  int64_t scatter = 0;
};

// Layers of a slab that cross a link in one copy. Their event says when they have arrived.
struct Part {
  int64_t end;  // it holds the slab's rows up to this one, behind the part before it
  c10::Event ready;
};

// What one device holds of a placed prefix. Only what comes on a side stream has parts: they arrive in
// their order, and a stream that waits for one of them waits for those before it as well.
struct Slab {
  c10::Device device;
  std::vector<int64_t> layers;
  at::Tensor data;
  std::optional<c10::Stream> side;
  std::vector<Part> parts;
  std::vector<std::pair<c10::Stream, size_t>> waiting;  // streams, and how many parts each waits for
};

// A prefix on its way to its devices. Slabs are numbered as the devices of the plan.
class Placement {
 public:
  Placement(std::vector<Slab> slabs, int64_t batch, Copies copies);
  Placement(Placement&&) = default;  // an Event has one owner

  // (keys, values) by layer, each [batch, H, P, D]: views of the slabs, broadcast over the batch.
  std::pair<std::vector<at::Tensor>, std::vector<at::Tensor>> layers() const;

  // Writes a slab into positions [0, P) of `target` [l, 2, batch, H, N, D], in one copy on the stream that
  // the slab arrives on, after what the current stream still does with the target.
  void scatter(size_t index, const at::Tensor& target);

  // Makes the current stream of the slab's device wait until the slab (and its scatter) is there. For each
  // stream the first call counts: a stream that waited has to do so only once, and does it for no other.
  void wait(size_t index);

  // The same for the part that holds one layer.
  void wait_for_layer(int64_t layer);

  // Whether a layer comes on a side stream, so that its readers have to wait.
  bool is_under_way(int64_t layer) const;

  Copies copies() const {
    return copies_;
  }

 private:
  std::pair<size_t, int64_t> find(int64_t layer) const;  // its slab, and its row there

  std::vector<Slab> slabs_;
  int64_t batch_;
  Copies copies_;
};

// What crosses a link in one copy, unless it is more than twice as large: the first layers can then start
// before the last have arrived. 8 MB take about 150 us over PCIe 5, 30 times what a launch costs.
constexpr int64_t kPartBytes = int64_t{8} << 20;

// Places prefixes for one reader: its layer -> device map, and the dtype of its cache.
class Placer {
 public:
  Placer(
      const std::vector<std::string>& layer_devices, at::ScalarType dtype,
      int64_t part_bytes = kPartBytes);

  // Sends a prefix off: gathered by device if the map is odd, cast before the link, then one copy for each
  // device that it is not on, on a side stream. Slabs on the prefix's own device are views of it; where it
  // is cast there, its layout stays if it can: a transposition would cost three times what a cast does.
  // With gradients (grad mode, and a prefix that requires them) everything runs on the current streams.
  // A copy on a side stream reads its source later than this call. So it reads a copy of the prefix, unless
  // the prefix is `stable`: the caller promises not to write to it again.
  Placement place(const at::Tensor& given, int64_t batch, bool stable) const;

 private:
  void check(const at::Tensor& prefix, int64_t batch) const;
  bool stays_in_place(const at::Tensor& prefix) const;
  bool is_ready(const at::Tensor& prefix) const;
  bool keeps_layout(const at::Tensor& prefix) const;
  at::Tensor prepare(const at::Tensor& prefix, bool stable, Copies& copies) const;
  at::Tensor prepare_with_gradients(const at::Tensor& prefix, Copies& copies) const;
  void send(Slab& slab, Copies& copies) const;

  std::vector<DeviceRuns> devices_;
  std::vector<std::optional<c10::Stream>> sides_;  // one for each accelerator in devices_
  std::shared_ptr<HostPool> pool_;
  int64_t layers_;
  at::ScalarType dtype_;
  int64_t part_bytes_;
};

}  // namespace latentwire
