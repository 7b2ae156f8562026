#include "host_pool.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/alloc_cpu.h>

#include <utility>

namespace latentwire {

HostPool::~HostPool() {
  c10::free_cpu(kept_.memory);
}

at::Tensor HostPool::empty_strided(
    at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  const Block block =
      take(at::detail::computeStorageNbytes(sizes, strides, c10::elementSize(dtype)));
  return at::from_blob(
      block.memory, sizes, strides,
      [pool = shared_from_this(), block](void*) { pool->give_back(block); },
      at::TensorOptions().dtype(dtype));
}

HostPool::Block HostPool::take(size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (bytes <= kept_.bytes && kept_.bytes <= 2 * bytes) {
      return std::exchange(kept_, {});
    }
  }
  return {c10::alloc_cpu(bytes), bytes};
}

void HostPool::give_back(Block block) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (block.bytes > kept_.bytes) {
      std::swap(block, kept_);
    }
  }
  c10::free_cpu(block.memory);
}

}  // namespace latentwire
