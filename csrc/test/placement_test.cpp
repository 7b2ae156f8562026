// Tests of placement.cpp, run by tests/readers/test_kv_placement.py: the plan, and the order of copies on streams.
#include "placement.h"

#include <c10/core/StreamGuard.h>

#include <iostream>

#include "fake_accelerator.h"

using latentwire::Placement;
using latentwire::Placer;

namespace {

constexpr unsigned kOrders = 300;  // orders of execution tried for every case
constexpr int64_t kHeads = 2, kPositions = 3, kWidth = 4;

void check(bool holds, const std::string& what) {
  if (!holds) {
    throw std::runtime_error(what);
  }
}

template <typename Action>
void check_refused(Action action, const std::string& part) {
  try {
    action();
  } catch (const c10::ValueError& error) {
    check(std::string(error.what()).find(part) != std::string::npos, error.what());
    return;
  }
  throw std::runtime_error("accepted, but should say: " + part);
}

using Runs = std::vector<std::pair<int64_t, int64_t>>;

Runs runs_of(const latentwire::DeviceRuns& entry) {
  Runs runs;
  for (const auto& run : entry.runs) {
    runs.emplace_back(run.first, run.count);
  }
  return runs;
}

void test_plan() {
  const auto even = latentwire::plan({"cuda:1", "cuda:1", "cuda:0"});
  check(even.size() == 2 && even[0].device.str() == "cuda:1", "devices in order of first layer");
  check(runs_of(even[0]) == Runs{{0, 2}} && runs_of(even[1]) == Runs{{2, 1}}, "contiguous runs");

  const auto odd = latentwire::plan({"cpu", "cuda:0", "cpu:0", "cpu", "cuda:0"});
  check(odd.size() == 2, "cpu:0 is cpu");
  check(runs_of(odd[0]) == Runs{{0, 1}, {2, 2}}, "an odd map gives several runs");
  check(runs_of(odd[1]) == Runs{{1, 1}, {4, 1}}, "an odd map gives several runs");

  check_refused([] { latentwire::plan({}); }, "names no layer");
  check_refused([] { latentwire::plan({"cpu", "disk"}); }, "layer 1 is on 'disk'");
  check_refused([] { latentwire::plan({"meta"}); }, "layer 0 is on 'meta'");
  check_refused([] { latentwire::plan({"gpu"}); }, "not a device");
  check_refused([] { latentwire::plan({"cuda"}); }, "may be any of several");
  check_refused([] { Placer({"fake:7"}, at::kFloat); }, "not on this machine");
}

// One placement whose producer, copies and consumers run in an order of the machine's choosing.
struct Scenario {
  std::vector<std::string> layer_devices;
  c10::Device producer;
  bool waits = true;
  bool into_static_cache = false;
  bool positions_first = false;  // the prefix's layout in memory, as its generator makes it
  int64_t part_bytes = latentwire::kPartBytes;
  bool by_layer = false;  // each layer waits for itself, not the device for all of its layers
};

// What a consumer read, and what it should have.
struct Reading {
  at::Tensor seen;
  at::Tensor expected;
};

// Whole numbers up to 250, which bfloat16 holds exactly.
at::Tensor prefix_values(int64_t layers, unsigned seed) {
  const int64_t count = layers * 2 * kHeads * kPositions * kWidth;
  return (at::arange(count) + int64_t{seed}).remainder(251).to(at::kFloat).reshape(
      {layers, 2, 1, kHeads, kPositions, kWidth});
}

at::Tensor produce(const at::Tensor& values, const Scenario& scenario) {
  const c10::Device device = scenario.producer;
  const auto strides = scenario.positions_first
      ? values.permute({2, 4, 0, 1, 3, 5}).contiguous().permute({2, 3, 0, 4, 1, 5}).strides()
      : values.strides();
  const at::Tensor prefix =
      at::empty_strided(values.sizes(), strides, at::TensorOptions(device).dtype(at::kFloat));
  if (device.is_cpu()) {
    return prefix.copy_(values);
  }
  fake::send(fake::current_stream(device.index()), [values, to = fake::memory_of(prefix)] {
    to.copy_(values);
  });
  return prefix;
}

// Sends a read of a tensor to the current stream of its device.
Reading read_later(const at::Tensor& tensor, const at::Tensor& expected) {
  const at::Tensor seen = at::zeros(expected.sizes());
  fake::send(
      fake::current_stream(tensor.device().index()),
      [from = fake::memory_of(tensor), seen] { seen.copy_(from); });
  return {seen, expected};
}

// A cache that the consumer, when the prefix comes, is still to fill with sevens and to read.
at::Tensor used_cache(const latentwire::DeviceRuns& entry, std::vector<Reading>& readings) {
  int64_t layers = 0;
  for (const auto& run : entry.runs) {
    layers += run.count;
  }
  const at::Tensor cache = at::empty(
      {layers, 2, 1, kHeads, kPositions + 2, kWidth},
      at::TensorOptions(entry.device).dtype(at::kBFloat16));
  fake::send(fake::current_stream(entry.device.index()), [memory = fake::memory_of(cache)] {
    memory.fill_(7);
  });
  readings.push_back(read_later(cache, at::full(cache.sizes(), 7.0f)));
  return cache;
}

latentwire::Copies send_all(
    const Scenario& scenario, const at::Tensor& values, std::vector<Reading>& readings) {
  const Placer placer(scenario.layer_devices, at::kBFloat16, scenario.part_bytes);
  const auto plan = latentwire::plan(scenario.layer_devices);
  std::vector<at::Tensor> caches;
  for (size_t i = 0; scenario.into_static_cache && i < plan.size(); ++i) {
    caches.push_back(used_cache(plan[i], readings));
  }
  // The prefix is freed when it has been placed, and the placement at the end of this function: both
  // while all of the work is still to run.
  Placement placement = placer.place(produce(values, scenario), 1, false);
  const auto keys = placement.layers().first;
  for (size_t i = 0; i < plan.size(); ++i) {
    if (scenario.into_static_cache) {
      placement.scatter(i, caches[i]);
    }
    if (scenario.waits && !scenario.by_layer) {
      placement.wait(i);
    }
    int64_t row = 0;
    for (const auto& run : plan[i].runs) {
      for (int64_t layer = run.first; layer < run.first + run.count; ++layer, ++row) {
        if (scenario.by_layer) {
          placement.wait_for_layer(layer);
        }
        const at::Tensor placed = scenario.into_static_cache
            ? caches[i].select(0, row).select(0, 0).narrow(2, 0, kPositions)
            : keys[layer];
        readings.push_back(read_later(placed, values.select(0, layer).select(0, 0)));
      }
    }
  }
  return placement.copies();
}

// Runs a scenario in the order of `seed`; whether every consumer read what it should have.
bool is_right(const Scenario& scenario, unsigned seed, latentwire::Copies& copies) {
  const auto layers = static_cast<int64_t>(scenario.layer_devices.size());
  std::vector<Reading> readings;
  copies = send_all(scenario, prefix_values(layers, seed), readings);
  fake::drain(seed);
  return std::all_of(readings.begin(), readings.end(), [](const Reading& reading) {
    return at::equal(reading.seen, reading.expected);
  });
}

void check_all_orders(const Scenario& scenario, int64_t prepare, int64_t link, int64_t scatter) {
  latentwire::Copies copies;
  for (unsigned seed = 0; seed < kOrders; ++seed) {
    check(is_right(scenario, seed, copies), "wrong values in order " + std::to_string(seed));
  }
  check(copies.prepare == prepare, "prepare copies: " + std::to_string(copies.prepare));
  check(copies.link == link, "link copies: " + std::to_string(copies.link));
  check(copies.scatter == scatter, "scatter copies: " + std::to_string(copies.scatter));
}

const std::vector<std::string> kTwoDevices{"fake:0", "fake:0", "fake:1", "fake:1", "fake:1"};
const std::vector<std::string> kOddMap{"fake:0", "fake:1", "fake:0", "fake:1", "fake:1"};
const c10::Device kHost(c10::kCPU), kFirst(fake::kType, 0);

void test_from_another_device() {
  check_all_orders({kTwoDevices, kFirst}, 1, 1, 0);
}

void test_from_the_host() {
  check_all_orders({kTwoDevices, kHost}, 1, 2, 0);
}

void test_odd_map() {
  check_all_orders({kOddMap, kFirst}, 1, 1, 0);
}

void test_static_cache() {
  check_all_orders({kTwoDevices, kFirst, true, true}, 1, 1, 2);
  check_all_orders({kTwoDevices, kHost, true, true}, 1, 2, 2);
}

// Cast where it is: the views have the prefix's own layout.
void test_layout_stays() {
  const std::vector<std::string> one_device(3, "fake:0");
  check_all_orders({one_device, kFirst, true, false, true}, 1, 0, 0);
  check_all_orders({kTwoDevices, kFirst, true, false, true}, 1, 1, 0);
  const Scenario scenario{one_device, kFirst, true, false, true};
  const at::Tensor prefix = produce(prefix_values(3, 0), scenario);
  const auto keys = Placer(one_device, at::kBFloat16).place(prefix, 1, false).layers().first;
  fake::drain(0);
  check(keys[1].stride(2) == prefix.stride(4) && keys[1].stride(1) == kWidth, "the layout changed");
}

void test_host_pool() {
  const auto pool = std::make_shared<latentwire::HostPool>();
  const auto make = [&](int64_t count) { return pool->empty_strided({count}, {1}, at::kFloat); };
  at::Tensor view = make(100).narrow(0, 40, 2);
  const void* const first = view.storage().data();
  check(make(60).data_ptr() != first, "a view keeps its memory");
  view.reset();
  check(make(50).data_ptr() == first, "what is gone serves again, if half of it is needed");
  check(make(49).data_ptr() != first, "what needs less leaves it");
  const at::Tensor large = make(100), small = make(60);
  check(large.data_ptr() == first && small.data_ptr() != first, "a block is given out once");
}

// A slab in parts, each layer waiting for the part that holds it.
void test_parts() {
  const auto case_of = [](c10::Device producer, bool into_static_cache, bool by_layer) {
    const int64_t one_layer = 2 * kHeads * kPositions * kWidth * 2;
    return Scenario{kTwoDevices, producer, true, into_static_cache, false, one_layer, by_layer};
  };
  for (const bool by_layer : {false, true}) {
    check_all_orders(case_of(kFirst, false, by_layer), 1, 3, 0);
    check_all_orders(case_of(kHost, false, by_layer), 1, 5, 0);
    check_all_orders(case_of(kHost, true, by_layer), 1, 5, 2);
  }
}

// Whether two prefixes A and B that one thread places are read right, A on stream 1 and B on stream 2 of
// the second device: fill A, fill B, read B, read A. What read B waits for is for both, as it was when
// the filler kept one list of placements for all caches; read A waits only if `each_waits`.
bool reads_right_on_two_streams(bool each_waits, unsigned seed) {
  const c10::Device second(fake::kType, 1);
  const std::vector<std::string> layers(2, "fake:1");
  const Scenario scenario{layers, kFirst};
  const Placer placer(layers, at::kBFloat16);
  const std::vector<at::Tensor> values{prefix_values(2, seed), prefix_values(2, seed + 100)};
  const std::vector<c10::Stream> streams{
      fake::Guard().getStreamFromGlobalPool(second, false),
      fake::Guard().getStreamFromGlobalPool(second, false)};
  std::vector<Placement> placements;
  std::vector<Reading> readings;
  for (size_t i = 0; i < 2; ++i) {
    const c10::StreamGuard guard(streams[i]);
    placements.push_back(placer.place(produce(values[i], scenario), 1, false));
  }
  for (const size_t i : {1, 0}) {
    const c10::StreamGuard guard(streams[i]);
    if (each_waits) {
      placements[i].wait_for_layer(1);
    } else if (i == 1) {
      placements[0].wait(0);
      placements[1].wait(0);
    }
    readings.push_back(
        read_later(placements[i].layers().first[1], values[i].select(0, 1).select(0, 0)));
  }
  fake::drain(seed);
  return std::all_of(readings.begin(), readings.end(), [](const Reading& reading) {
    return at::equal(reading.seen, reading.expected);
  });
}

void test_two_streams() {
  unsigned wrong = 0;
  for (unsigned seed = 0; seed < kOrders; ++seed) {
    check(reads_right_on_two_streams(true, seed), "wrong in order " + std::to_string(seed));
    wrong += !reads_right_on_two_streams(false, seed);
  }
  check(wrong > 0, "no order was wrong where another stream waited");
  std::cout << "without a wait of its own: wrong in " << wrong << " of " << kOrders << " orders\n";
}

// A prefix that needs no cast, and that its owner writes to as soon as it has been placed.
bool survives_its_owner(c10::Device producer, bool stable, unsigned seed) {
  const std::vector<std::string> layers(2, "fake:1");
  const at::Tensor values = prefix_values(2, seed);
  const at::Tensor prefix = produce(values, {layers, producer});
  const Placer placer(layers, at::kFloat);
  Placement placement = placer.place(prefix, 1, stable);
  if (producer.is_cpu()) {
    prefix.fill_(-1);
  } else {
    fake::send(fake::current_stream(producer.index()), [memory = fake::memory_of(prefix)] {
      memory.fill_(-1);
    });
  }
  placement.wait(0);
  const Reading reading =
      read_later(placement.layers().first[1], values.select(0, 1).select(0, 0));
  fake::drain(seed);
  return at::equal(reading.seen, reading.expected);
}

void test_a_prefix_that_is_written_again() {
  for (const c10::Device producer : {kHost, kFirst}) {
    unsigned wrong = 0;
    for (unsigned seed = 0; seed < kOrders; ++seed) {
      check(survives_its_owner(producer, false, seed), "wrong in order " + std::to_string(seed));
      wrong += !survives_its_owner(producer, true, seed);
    }
    check(wrong > 0, "no order was wrong where a stable prefix was written to");
    std::cout << "a stable prefix that was written to: wrong in " << wrong << " of " << kOrders
              << " orders\n";
  }
}

// The control: these tests are able to see a missing wait.
void test_a_missing_wait_shows() {
  latentwire::Copies copies;
  unsigned wrong = 0;
  for (unsigned seed = 0; seed < kOrders; ++seed) {
    wrong += !is_right({kTwoDevices, kFirst, false}, seed, copies);
  }
  check(wrong > 0, "no order was wrong without a wait");
}

// The consumer computes on a stream of its own.
void test_consumer_on_another_stream() {
  const c10::Device second(fake::kType, 1);
  const c10::StreamGuard guard(fake::Guard().getStreamFromGlobalPool(second, false));
  check_all_orders({kTwoDevices, kFirst}, 1, 1, 0);
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, void (*)()> tests{
      {"plan", test_plan},
      {"from_another_device", test_from_another_device},
      {"from_the_host", test_from_the_host},
      {"odd_map", test_odd_map},
      {"static_cache", test_static_cache},
      {"layout_stays", test_layout_stays},
      {"host_pool", test_host_pool},
      {"parts", test_parts},
      {"two_streams", test_two_streams},
      {"a_prefix_that_is_written_again", test_a_prefix_that_is_written_again},
      {"a_missing_wait_shows", test_a_missing_wait_shows},
      {"consumer_on_another_stream", test_consumer_on_another_stream},
  };
  c10::register_privateuse1_backend("fake");
  try {
    tests.at(argc > 1 ? argv[1] : "")();
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
