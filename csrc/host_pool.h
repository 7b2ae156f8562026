// Memory on the host that is used again.
//
// malloc returns blocks of more than 32 MB to the system, which then hands out new ones page by page: of
// a cast to bfloat16 that writes 105 MB (32 layers, batch 8, 100 positions) that was 49 ms of 60.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <memory>
#include <mutex>

namespace latentwire {

// Makes tensors whose memory comes back when the last reference to it is gone: what a tensor or a view of
// one still holds is never given out again. The largest block that came back is kept, and serves tensors
// that need at least half of it.
class HostPool : public std::enable_shared_from_this<HostPool> {
 public:
  ~HostPool();

  // A tensor on the CPU, its values undefined. Any thread may ask, and drop it.
  at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

 private:
  struct Block {
    void* memory = nullptr;
    size_t bytes = 0;
  };

  Block take(size_t bytes);
  void give_back(Block block);

  std::mutex mutex_;
  Block kept_;
};

}  // namespace latentwire
