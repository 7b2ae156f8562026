// The autoregressive prior of wire version 2, and the range coder that it drives: what
// latentwire_fast/wire/recurrent_prior.py and range_coder.py do, in the same whole numbers, bit for bit.
// docs/wire_format.md is the specification. Nothing here uses floats, or torch.
//
// Shapes as in recurrent_prior.py: N symbols of a message, T pieces of it, P pieces of a row, c columns of a
// piece, K values, e features of a symbol, F = c * e, H the state's width, W that of a symbol's own layer.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace latentwire {

// The symbols' place in a latent, as `Layout` in Python.
struct PriorLayout {
  int64_t rows;
  std::vector<int64_t> sizes;  // of the symbols of a row
  int64_t features;
  int64_t width;
};

// The network of a model. Calls do not change it: threads may share one.
class RecurrentPrior {
 public:
  // The numbers by name, row-major, and 2^24 * 2^(-f / 256) for f from 0 to 255. Throws
  // std::invalid_argument if one is missing, has another length, or a size is not from 1 to 65536.
  RecurrentPrior(PriorLayout layout, const std::map<std::string, std::vector<int16_t>>& arrays,
                 std::vector<int64_t> powers);

  // The message of symbols: those of rows first, then others, which have a row of cumulative frequencies
  // each. Throws std::invalid_argument if their number fits no message, or a symbol is not below its size.
  std::string encode(const std::vector<int64_t>& symbols, const std::vector<std::vector<int64_t>>& rest) const;

  // The symbols of a message: `count` of rows, then one for each of `rest`. Empty if the bytes are not what
  // `encode` writes.
  std::vector<int64_t> decode(std::string_view message, int64_t count,
                              const std::vector<std::vector<int64_t>>& rest) const;

 private:
  template <class Coder>
  bool code(Coder& coder, int64_t count, std::vector<int64_t>& symbols) const;
  void row_of(const std::vector<int64_t>& sums, int64_t t, int64_t p, int64_t column,
              std::vector<int64_t>& row) const;

  PriorLayout layout_;
  std::vector<int64_t> powers_;
  int64_t columns_, pieces_, values_, inner_, inputs_;  // c, P, K, W, F
  std::vector<int64_t> sizes_;                          // [P, c], 0 where a piece has no such column
  std::vector<int16_t> base_, features_, shift_, bias_;
  std::vector<int16_t> carry_;   // [H, H], by the input
  std::vector<int16_t> takes_;   // [P, F, H]
  std::vector<int16_t> read_;    // [P, H, c * W]
  std::vector<int16_t> own_;     // [P, F, c * W]
  std::vector<int16_t> out_;     // [P, c, W, K]
};

}  // namespace latentwire
