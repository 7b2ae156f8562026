// A make-believe accelerator with two devices, on which missing waits show without a GPU.
//
// It takes torch's PrivateUse1 slot. Nothing that is sent to a stream runs until `drain`, which then runs
// the heads of the queues in an order of its own choosing: any order that streams and events allow. Its
// allocator behaves as the CUDA caching allocator does: memory that is freed may be written by later work
// of the stream it was allocated on, at once, unless other streams were recorded as its users. Here that
// later work always comes, and writes NaN. So a wait or a record that is missing gives wrong numbers for
// some order, and the tests try many.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <utility>
#include <vector>

namespace fake {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;

struct EventState {
  int recorded = 0;  // versions sent to a stream
  int done = 0;      // versions that a stream has passed
};

struct Task {
  std::function<bool()> ready;
  std::function<void()> run;
};

struct Block {
  size_t bytes;
  c10::Stream stream;
  std::set<std::pair<c10::DeviceIndex, c10::StreamId>> users;
};

struct Machine {
  std::map<std::pair<c10::DeviceIndex, c10::StreamId>, std::deque<Task>> queues;
  std::map<c10::DeviceIndex, c10::StreamId> current;
  std::map<void*, Block> blocks;
  c10::DeviceIndex device = 0;
  c10::StreamId next_stream = 1;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline c10::Stream stream_of(c10::DeviceIndex device, c10::StreamId id) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, device), id);
}

inline c10::Stream current_stream(c10::DeviceIndex device) {
  return stream_of(device, machine().current[device]);
}

inline void send(const c10::Stream& stream, std::function<void()> run) {
  machine().queues[{stream.device_index(), stream.id()}].push_back(
      {[] { return true; }, std::move(run)});
}

inline void record(const std::shared_ptr<EventState>& event, const c10::Stream& stream) {
  const int version = ++event->recorded;
  send(stream, [event, version] { event->done = std::max(event->done, version); });
}

inline void block(const std::shared_ptr<EventState>& event, const c10::Stream& stream) {
  const int version = event->recorded;
  machine().queues[{stream.device_index(), stream.id()}].push_back(
      {[event, version] { return event->done >= version; }, [] {}});
}

// Runs everything that was sent, one head at a time, chosen at random among those that may run. A
// stream's turn lasts for a random number of tasks, so that streams also overtake each other by far.
inline void drain(unsigned seed) {
  std::mt19937 random(seed);
  for (;;) {
    std::vector<std::deque<Task>*> able;
    bool empty = true;
    for (auto& [key, queue] : machine().queues) {
      empty = empty && queue.empty();
      if (!queue.empty() && queue.front().ready()) {
        able.push_back(&queue);
      }
    }
    if (empty) {
      return;
    }
    TORCH_CHECK(!able.empty(), "deadlock: every stream waits for another");
    auto& queue = *able[random() % able.size()];
    for (auto turns = random() % 8 + 1; turns > 0 && !queue.empty() && queue.front().ready(); --turns) {
      const Task task = std::move(queue.front());
      queue.pop_front();
      task.run();
    }
  }
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kType;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    machine().device = device.index();
    return before;
  }
  c10::Device getDevice() const override { return c10::Device(kType, machine().device); }
  void setDevice(c10::Device device) const override { machine().device = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    machine().device = device.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    return current_stream(device.has_index() ? device.index() : machine().device);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream_of(device.index(), 0);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return stream_of(device.index(), machine().next_stream++);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = current_stream(stream.device_index());
    machine().current[stream.device_index()] = stream.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(
      void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*event) {
      *event = new std::shared_ptr<EventState>(std::make_shared<EventState>());
    }
    fake::record(*static_cast<std::shared_ptr<EventState>*>(*event), stream);
  }
  void block(void* event, const c10::Stream& stream) const override {
    fake::block(*static_cast<std::shared_ptr<EventState>*>(event), stream);
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<std::shared_ptr<EventState>*>(event);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    machine().blocks.at(data.get()).users.insert({stream.device_index(), stream.id()});
  }
};

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const auto device = machine().device;
    void* memory = std::malloc(std::max<size_t>(bytes, 1));
    std::memset(memory, 0xFF, bytes);  // all ones is a NaN in every float format
    machine().blocks.insert_or_assign(memory, Block{bytes, current_stream(device), {}});
    return {memory, memory, &release, c10::Device(kType, device)};
  }
  static void release(void* memory) {
    auto& block = machine().blocks.at(memory);
    for (const auto& [device, id] : block.users) {
      const auto used = std::make_shared<EventState>();
      record(used, stream_of(device, id));
      fake::block(used, block.stream);
    }
    // The memory itself is never given back: the tests are short.
    send(block.stream, [memory, bytes = block.bytes] { std::memset(memory, 0xFF, bytes); });
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

inline Allocator& allocator() {
  static Allocator instance;
  return instance;
}

inline at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(*device);
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &allocator(), keys, dtype.value_or(at::kFloat), format);
}

inline at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(*device);
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(
      size, stride, &allocator(), keys, dtype.value_or(at::kFloat));
}

// The tensor's memory seen from the CPU, now; it is not kept alive.
inline at::Tensor memory_of(const at::Tensor& tensor) {
  return at::from_blob(
      tensor.data_ptr(), tensor.sizes(), tensor.strides(),
      at::TensorOptions().dtype(tensor.scalar_type()));
}

// As CUDA's copy: on the current stream of the source's device, which waits for the destination's current
// stream before and is waited for by it after.
inline at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool) {
  TORCH_CHECK(!target.is_cpu(), "the tests read memory themselves");
  const auto here = current_stream(target.device().index());
  const auto stream = source.is_cpu() ? here : current_stream(source.device().index());
  if (stream != here) {
    const auto free = std::make_shared<EventState>();
    record(free, here);
    block(free, stream);
  }
  const auto from = source.is_cpu() ? source : memory_of(source);
  send(stream, [from, to = memory_of(target)] { to.copy_(from.expand(to.sizes())); });
  if (stream != here) {
    const auto arrived = std::make_shared<EventState>();
    record(arrived, stream);
    block(arrived, here);
  }
  return target;
}

inline at::Tensor& cat_out(const at::ITensorListRef& tensors, int64_t dim, at::Tensor& result) {
  int64_t first = 0;
  for (const at::Tensor& part : tensors) {
    result.narrow(dim, first, part.size(dim)).copy_(part);
    first += part.size(dim);
  }
  return result;
}

inline at::Tensor as_strided(
    const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride,
    std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

inline at::Tensor view(const at::Tensor& self, at::IntArrayRef size) {
  return at::native::view(self, size);
}

inline at::Tensor reshape_alias(
    const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("_copy_from", copy_from);
  m.impl("cat.out", cat_out);
}

}  // namespace fake
