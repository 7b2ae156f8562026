#include "placement.h"

#include <ATen/ATen.h>
#include <ATen/TensorUtils.h>
#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/GradMode.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace latentwire {
namespace {

using c10::impl::VirtualGuardImpl;

c10::Device parse_device(const std::string& name, size_t layer) {
  TORCH_CHECK_VALUE(
      name != "disk" && name != "meta", "layer ", layer, " is on '", name,
      "', which holds no memory to place a prefix in; load the reader with that layer on a device");
  std::optional<c10::Device> device;
  try {
    device = c10::Device(name);
  } catch (const c10::Error&) {
    TORCH_CHECK_VALUE(
        false, "layer ", layer, " is on '", name,
        "', which is not a device; name one such as 'cpu' or 'cuda:0'");
  }
  if (device->is_cpu()) {
    return c10::Device(c10::kCPU);
  }
  TORCH_CHECK_VALUE(
      device->has_index(), "layer ", layer, " is on '", name, "', which may be any of several; ",
      "say which, as in '", name, ":0'");
  return *device;
}

constexpr int64_t kMostParts = 8;

// Waits on `stream` for everything that was sent to `earlier` so far.
void order_after(const c10::Stream& stream, const c10::Stream& earlier) {
  c10::Event event(earlier.device_type());
  event.record(earlier);
  event.block(stream);
}

// Keeps the memory of `tensor` from being given away before `stream` is done with it.
void keep_alive_on(const at::Tensor& tensor, const c10::Stream& stream) {
  VirtualGuardImpl(stream.device_type())
      .recordDataPtrOnStream(tensor.storage().data_ptr(), stream);
}

bool is_odd(const std::vector<DeviceRuns>& devices) {
  return std::any_of(
      devices.begin(), devices.end(), [](const DeviceRuns& entry) { return entry.runs.size() > 1; });
}

// Whether layers, keys and values are one dimension, as they must be for views to show them.
bool has_flat_layers(const at::Tensor& prefix) {
  return prefix.stride(0) == 2 * prefix.stride(1);
}

// The parts of a prefix in the order of the devices.
std::vector<at::Tensor> runs_of(const at::Tensor& prefix, const std::vector<DeviceRuns>& devices) {
  std::vector<at::Tensor> runs;
  for (const auto& entry : devices) {
    for (const auto& run : entry.runs) {
      runs.push_back(prefix.narrow(0, run.first, run.count));
    }
  }
  return runs;
}

// Makes the current stream of the slab's device wait for so many of its parts, unless it does already.
void wait_for_parts(Slab& slab, size_t count) {
  if (count == 0) {
    return;
  }
  const c10::Stream consumer = VirtualGuardImpl(slab.device.type()).getStream(slab.device);
  auto known = std::find_if(slab.waiting.begin(), slab.waiting.end(), [&](const auto& entry) {
    return entry.first == consumer;
  });
  if (known == slab.waiting.end()) {
    keep_alive_on(slab.data, consumer);
    slab.waiting.emplace_back(consumer, 0);
    known = std::prev(slab.waiting.end());
  }
  if (known->second < count) {
    slab.parts[count - 1].ready.block(consumer);
    known->second = count;
  }
}

std::vector<int64_t> layers_of(const DeviceRuns& entry) {
  std::vector<int64_t> layers;
  for (const auto& run : entry.runs) {
    for (int64_t i = 0; i < run.count; ++i) {
      layers.push_back(run.first + i);
    }
  }
  return layers;
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

Placement::Placement(std::vector<Slab> slabs, int64_t batch, Copies copies)
    : slabs_(std::move(slabs)), batch_(batch), copies_(copies) {}

std::pair<std::vector<at::Tensor>, std::vector<at::Tensor>> Placement::layers() const {
  size_t count = 0;
  for (const auto& slab : slabs_) {
    count += slab.layers.size();
  }
  std::vector<at::Tensor> keys(count), values(count);
  for (const auto& slab : slabs_) {
    auto shape = slab.data.sizes().vec();
    shape[2] = batch_;
    // One unbind for all of a device's views: 2 l calls of select cost more than the views themselves.
    const auto views = slab.data.expand(shape).flatten(0, 1).unbind(0);
    for (size_t i = 0; i < slab.layers.size(); ++i) {
      keys[slab.layers[i]] = views[2 * i];
      values[slab.layers[i]] = views[2 * i + 1];
    }
  }
  return {std::move(keys), std::move(values)};
}

std::pair<size_t, int64_t> Placement::find(int64_t layer) const {
  for (size_t index = 0; index < slabs_.size(); ++index) {
    const auto& layers = slabs_[index].layers;
    const auto found = std::find(layers.begin(), layers.end(), layer);
    if (found != layers.end()) {
      return {index, found - layers.begin()};
    }
  }
  TORCH_CHECK_VALUE(false, "there is no layer number ", layer);
}

void Placement::scatter(size_t index, const at::Tensor& target) {
  TORCH_CHECK_VALUE(index < slabs_.size(), "there is no device number ", index);
  Slab& slab = slabs_[index];
  auto shape = slab.data.sizes().vec();
  const int64_t positions = shape[4];
  shape[2] = batch_;
  TORCH_CHECK_VALUE(
      target.dim() == 6 && target.size(4) >= positions,
      "the cache holds ", target.dim() == 6 ? target.size(4) : 0, " positions and the prefix ",
      positions, "; make the cache longer");
  const at::Tensor part = target.narrow(4, 0, positions);
  TORCH_CHECK_VALUE(
      part.sizes() == shape && target.scalar_type() == slab.data.scalar_type() &&
          target.device() == slab.device,
      "the cache is ", target.sizes(), " of ", target.scalar_type(), " on ", target.device(),
      " and the prefix ", shape, " of ", slab.data.scalar_type(), " on ", slab.device);
  ++copies_.scatter;
  if (!slab.side) {
    part.copy_(slab.data);
    return;
  }
  order_after(*slab.side, VirtualGuardImpl(slab.device.type()).getStream(slab.device));
  keep_alive_on(target, *slab.side);
  const c10::StreamGuard guard(*slab.side);
  part.copy_(slab.data);
  slab.parts.erase(slab.parts.begin(), std::prev(slab.parts.end()));  // one event for all of it now
  slab.parts.back().ready.record(*slab.side);
  slab.waiting.clear();
}

void Placement::wait(size_t index) {
  TORCH_CHECK_VALUE(index < slabs_.size(), "there is no device number ", index);
  wait_for_parts(slabs_[index], slabs_[index].parts.size());
}

void Placement::wait_for_layer(int64_t layer) {
  const auto [index, row] = find(layer);
  Slab& slab = slabs_[index];
  size_t parts = 0;
  while (parts < slab.parts.size() && (parts == 0 || slab.parts[parts - 1].end <= row)) {
    ++parts;
  }
  wait_for_parts(slab, parts);
}

bool Placement::is_under_way(int64_t layer) const {
  return !slabs_[find(layer).first].parts.empty();
}

Placer::Placer(
    const std::vector<std::string>& layer_devices, at::ScalarType dtype, int64_t part_bytes)
    : devices_(plan(layer_devices)),
      pool_(std::make_shared<HostPool>()),
      layers_(static_cast<int64_t>(layer_devices.size())),
      dtype_(dtype),
      part_bytes_(part_bytes) {
  TORCH_CHECK_VALUE(at::isFloatingType(dtype), "the cache's dtype is ", dtype, ", not a float");
  for (const auto& entry : devices_) {
    const c10::Device device = entry.device;
    if (device.is_cpu()) {
      sides_.emplace_back(std::nullopt);
      continue;
    }
    TORCH_CHECK_VALUE(
        c10::impl::hasDeviceGuardImpl(device.type()) &&
            device.index() < VirtualGuardImpl(device.type()).deviceCount(),
        "layer ", entry.runs.front().first, " is on '", device, "', which is not on this machine, or "
        "not in this build of torch");
    // Kept for good: memory that is allocated on a stream is reused only on that stream.
    sides_.emplace_back(VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device));
  }
}

void Placer::check(const at::Tensor& prefix, int64_t batch) const {
  TORCH_CHECK_VALUE(
      prefix.dim() == 6 && prefix.size(1) == 2 && prefix.numel() > 0,
      "a prefix is [layers, 2, batch or 1, heads, positions, head width], none of them 0; this one is ",
      prefix.sizes());
  TORCH_CHECK_VALUE(
      prefix.size(0) == layers_, "the prefix has ", prefix.size(0), " layers and the reader ", layers_);
  TORCH_CHECK_VALUE(batch >= 1, "the batch is ", batch, ", and must be at least 1");
  TORCH_CHECK_VALUE(
      prefix.size(2) == 1 || prefix.size(2) == batch, "the prefix is for a batch of ", prefix.size(2),
      " and the cache for one of ", batch, "; only a batch of 1 is broadcast");
  TORCH_CHECK_VALUE(
      at::isFloatingType(prefix.scalar_type()) && prefix.layout() == at::kStrided &&
          !prefix.is_meta(),
      "a prefix is a dense tensor of floats with memory; this one is ", prefix.toString());
}

bool Placer::stays_in_place(const at::Tensor& prefix) const {
  return std::all_of(devices_.begin(), devices_.end(), [&](const DeviceRuns& entry) {
    return entry.device == prefix.device();
  });
}

bool Placer::is_ready(const at::Tensor& prefix) const {
  const bool fits = stays_in_place(prefix) ? has_flat_layers(prefix) : prefix.is_contiguous();
  return fits && prefix.scalar_type() == dtype_ && !is_odd(devices_);
}

bool Placer::keeps_layout(const at::Tensor& prefix) const {
  return stays_in_place(prefix) && has_flat_layers(prefix) && prefix.is_non_overlapping_and_dense();
}

at::Tensor Placer::prepare(const at::Tensor& prefix, bool stable, Copies& copies) const {
  // A copy from pageable memory is staged by the driver at a fraction of the link's speed.
  const bool pinned = prefix.is_cpu() &&
      std::any_of(devices_.begin(), devices_.end(), [](const DeviceRuns& entry) {
        const auto type = entry.device.type();
        return type != c10::kCPU && at::getHostAllocator(type) != nullptr;
      });
  const bool may_be_read_later = stable || stays_in_place(prefix);
  if (is_ready(prefix) && may_be_read_later && (!pinned || prefix.is_pinned())) {
    return prefix;
  }
  ++copies.prepare;
  const auto sizes = prefix.sizes();
  const auto strides =
      keeps_layout(prefix) ? prefix.strides().vec() : at::detail::defaultStrides(sizes);
  at::Tensor ready = prefix.is_cpu() && !pinned
      ? pool_->empty_strided(sizes, strides, dtype_)
      : at::empty_strided(sizes, strides, prefix.options().dtype(dtype_).pinned_memory(pinned));
  if (is_odd(devices_)) {
    return at::cat_out(ready, runs_of(prefix, devices_), 0);
  }
  return ready.copy_(prefix);
}

at::Tensor Placer::prepare_with_gradients(const at::Tensor& prefix, Copies& copies) const {
  at::Tensor ready = prefix;
  if (is_odd(devices_)) {
    ready = at::cat(runs_of(prefix, devices_), 0);
    ++copies.prepare;
    if (ready.scalar_type() == dtype_) {
      return ready;
    }
  } else if (is_ready(prefix)) {
    return prefix;
  }
  ++copies.prepare;
  return ready.to(
      dtype_, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
}

void Placer::send(Slab& slab, Copies& copies) const {
  const at::Tensor source = slab.data;
  const c10::Device from = source.device();
  std::vector<c10::Stream> streams{*slab.side};
  if (!from.is_cpu()) {
    // Copies between accelerators run on the source's current stream: give it a side stream as well.
    const VirtualGuardImpl producer(from.type());
    const c10::Stream out = producer.getStreamFromGlobalPool(from);
    order_after(out, producer.getStream(from));
    keep_alive_on(source, out);
    streams.push_back(out);
  }
  const c10::MultiStreamGuard guard(streams);
  slab.data = at::empty(source.sizes(), at::TensorOptions(slab.device).dtype(dtype_));
  const int64_t rows = source.size(0);
  const auto bytes = static_cast<int64_t>(source.nbytes());
  const int64_t parts = std::clamp(bytes / part_bytes_, int64_t{1}, std::min(rows, kMostParts));
  int64_t first = 0;
  for (int64_t part = 1; part <= parts; ++part) {
    const int64_t end = rows * part / parts;
    slab.data.narrow(0, first, end - first)
        .copy_(source.narrow(0, first, end - first), /*non_blocking=*/true);
    slab.parts.push_back({end, c10::Event(slab.device.type())});
    slab.parts.back().ready.record(*slab.side);
    ++copies.link;
    first = end;
  }
}

Placement Placer::place(const at::Tensor& given, int64_t batch, bool stable) const {
  check(given, batch);
  const bool training = c10::GradMode::is_enabled() && given.requires_grad();
  // One row that the caller broadcast already is still one row to copy; gradients go to all of them.
  const bool one_row = !training && given.stride(2) == 0;
  const at::Tensor prefix = one_row ? given.narrow(2, 0, 1) : given;
  Copies copies;
  const at::Tensor source =
      training ? prepare_with_gradients(prefix, copies) : prepare(prefix, stable, copies);
  std::vector<Slab> slabs;
  int64_t first = 0;
  for (size_t i = 0; i < devices_.size(); ++i) {
    const c10::Device device = devices_[i].device;
    auto layers = layers_of(devices_[i]);
    const auto count = static_cast<int64_t>(layers.size());
    Slab slab{device, std::move(layers), source.narrow(0, first, count), {}, {}, {}};
    first += count;
    if (device != source.device()) {
      if (training || device.is_cpu()) {
        slab.data = slab.data.to(device);
        ++copies.link;
      } else {
        slab.side = sides_[i];
        send(slab, copies);
      }
    }
    slabs.push_back(std::move(slab));
  }
  return Placement(std::move(slabs), batch, copies);
}

}  // namespace latentwire
