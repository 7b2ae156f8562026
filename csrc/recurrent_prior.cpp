#include "recurrent_prior.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace latentwire {
namespace {

constexpr int64_t kTotalBits = 16, kTotal = int64_t{1} << kTotalBits;
constexpr int64_t kWindow = 7;  // bytes of the number that are looked at at once
constexpr uint64_t kLeastWidth = uint64_t{1} << (8 * (kWindow - 1));
constexpr int64_t kPiece = 16, kFractionBits = 8, kWeightBits = 12, kOne = int64_t{1} << kFractionBits;
constexpr int64_t kWeight = int64_t{1} << kWeightBits;
constexpr int64_t kMost = (1 << 15) - 1;  // an activation at most
constexpr int64_t kFar = 31;                // 2^24 >> 31 is 0

// Narrows an interval of numbers; the message is the one in it with the most zero bytes at its end.
class Encoder {
 public:
  void narrow(uint64_t start, uint64_t frequency) {
    const uint64_t unit = width_ >> kTotalBits;
    low_ += unit * start;
    carry();
    width_ = unit * frequency;
    while (width_ < kLeastWidth) {
      bytes_.push_back(static_cast<char>(low_ >> (8 * (kWindow - 1))));
      low_ = (low_ & (kLeastWidth - 1)) << 8;
      width_ <<= 8;
    }
  }

  // The symbol is given: it stays.
  bool take(const std::vector<int64_t>& row, int64_t& symbol) {
    if (symbol < 0 || symbol + 1 >= static_cast<int64_t>(row.size()) || row[symbol + 1] <= row[symbol]) {
      throw std::invalid_argument("a symbol is not below its size");
    }
    narrow(row[symbol], row[symbol + 1] - row[symbol]);
    return true;
  }

  std::string message() {
    for (int64_t zeros = kWindow; zeros >= 0; --zeros) {
      const uint64_t unit = uint64_t{1} << (8 * zeros), over = low_ & (unit - 1);
      const uint64_t up = over == 0 ? 0 : unit - over;
      if (up < width_) {
        low_ += up;
        break;
      }
    }
    carry();
    for (int64_t byte = kWindow - 1; byte >= 0; --byte) bytes_.push_back(static_cast<char>(low_ >> (8 * byte)));
    bytes_.erase(bytes_.find_last_not_of('\0') + 1);
    return std::move(bytes_);
  }

 private:
  // What has grown beyond the window goes to the bytes before it.
  void carry() {
    if (low_ >> (8 * kWindow) == 0) return;
    low_ &= (uint64_t{1} << (8 * kWindow)) - 1;
    for (size_t i = bytes_.size(); i-- > 0;) {
      if (static_cast<unsigned char>(++bytes_[i]) != 0) return;
    }
  }

  std::string bytes_;
  uint64_t low_ = 0, width_ = uint64_t{1} << (8 * kWindow);
};

// Finds the symbols, and encodes them again beside, since only that message may stand for them.
class Decoder {
 public:
  explicit Decoder(std::string_view message) : message_(message) {
    for (int64_t i = 0; i < kWindow; ++i) code_ = code_ << 8 | next();
  }

  bool take(const std::vector<int64_t>& row, int64_t& symbol) {
    const uint64_t unit = width_ >> kTotalBits, value = code_ / unit;
    if (value >= static_cast<uint64_t>(kTotal)) return false;
    symbol = std::upper_bound(row.begin(), row.end(), static_cast<int64_t>(value)) - row.begin() - 1;
    const uint64_t start = row[symbol], frequency = row[symbol + 1] - row[symbol];
    code_ -= unit * start;
    width_ = unit * frequency;
    while (width_ < kLeastWidth) {
      code_ = code_ << 8 | next();
      width_ <<= 8;
    }
    again_.narrow(start, frequency);
    return true;
  }

  bool is_right() { return again_.message() == message_; }

 private:
  uint64_t next() { return at_ < message_.size() ? static_cast<unsigned char>(message_[at_++]) : 0; }

  std::string_view message_;
  size_t at_ = 0;
  uint64_t code_ = 0, width_ = uint64_t{1} << (8 * kWindow);
  Encoder again_;
};

// sums[i] += x * weights[i]
void add(std::vector<int64_t>& sums, int64_t x, const int16_t* weights, int64_t first = 0) {
  if (x == 0) return;
  const auto size = static_cast<int64_t>(sums.size());
  for (int64_t i = first; i < size; ++i) sums[i] += x * weights[i];
}

int64_t activation(int64_t sum) { return std::clamp<int64_t>(sum >> kWeightBits, 0, kMost); }

// [n, rows, columns] to [n, columns, rows]
std::vector<int16_t> turned(const std::vector<int16_t>& values, int64_t n, int64_t rows, int64_t columns) {
  std::vector<int16_t> found(values.size());
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        found[(i * columns + c) * rows + r] = values[(i * rows + r) * columns + c];
      }
    }
  }
  return found;
}

}  // namespace

RecurrentPrior::RecurrentPrior(PriorLayout layout, const std::map<std::string, std::vector<int16_t>>& arrays,
                               std::vector<int64_t> powers)
    : layout_(std::move(layout)), powers_(std::move(powers)) {
  const auto in_row = static_cast<int64_t>(layout_.sizes.size());
  if (layout_.rows < 1 || in_row < 1 || layout_.features < 1 || layout_.width < 1 ||
      static_cast<int64_t>(powers_.size()) != kOne) {
    throw std::invalid_argument("a layout of nothing");
  }
  for (const int64_t size : layout_.sizes) {
    if (size < 1 || size > kTotal) throw std::invalid_argument("a symbol's size is not from 1 to 65536");
  }
  const int64_t width = layout_.width;
  columns_ = std::min(kPiece, in_row);
  pieces_ = (in_row + kPiece - 1) / kPiece;
  values_ = *std::max_element(layout_.sizes.begin(), layout_.sizes.end());
  inner_ = std::max<int64_t>(4, width / 2);
  inputs_ = columns_ * layout_.features;
  sizes_ = layout_.sizes;
  sizes_.resize(pieces_ * columns_, 0);
  const int64_t steps = layout_.rows * pieces_, wide = columns_ * inner_;
  const auto get = [&](const char* name, int64_t size) {
    const auto found = arrays.find(name);
    if (found == arrays.end() || static_cast<int64_t>(found->second.size()) != size) {
      throw std::invalid_argument(std::string("the prior's ") + name + " is missing, or has another length");
    }
    return found->second;
  };
  base_ = get("base_TcK", steps * columns_ * values_);
  features_ = get("values_PcKe", pieces_ * columns_ * values_ * layout_.features);
  shift_ = get("shift_TH", steps * width);
  bias_ = get("bias_TcW", steps * wide);
  carry_ = turned(get("carry_HH", width * width), 1, width, width);
  takes_ = turned(get("inputs_PHF", pieces_ * width * inputs_), pieces_, width, inputs_);
  read_ = turned(get("read_PcWH", pieces_ * wide * width), pieces_, wide, width);
  own_ = turned(get("own_PcWF", pieces_ * wide * inputs_), pieces_, wide, inputs_);
  out_ = turned(get("out_PcKW", pieces_ * columns_ * values_ * inner_), pieces_ * columns_, values_, inner_);
}

std::string RecurrentPrior::encode(const std::vector<int64_t>& symbols,
                                   const std::vector<std::vector<int64_t>>& rest) const {
  const auto count = static_cast<int64_t>(symbols.size()) - static_cast<int64_t>(rest.size());
  Encoder encoder;
  std::vector<int64_t> found = symbols;
  code(encoder, count, found);
  for (size_t i = 0; i < rest.size(); ++i) encoder.take(rest[i], found[count + i]);
  return encoder.message();
}

std::vector<int64_t> RecurrentPrior::decode(std::string_view message, int64_t count,
                                            const std::vector<std::vector<int64_t>>& rest) const {
  Decoder decoder(message);
  std::vector<int64_t> found(count + rest.size());
  bool is_right = code(decoder, count, found);
  for (size_t i = 0; i < rest.size() && is_right; ++i) is_right = decoder.take(rest[i], found[count + i]);
  return is_right && decoder.is_right() ? found : std::vector<int64_t>{};
}

// Has the coder take `count` symbols, one after the other, by rows that go by those before.
template <class Coder>
bool RecurrentPrior::code(Coder& coder, int64_t count, std::vector<int64_t>& symbols) const {
  const auto in_row = static_cast<int64_t>(layout_.sizes.size());
  if (count < 0 || count % in_row != 0 || count / in_row > layout_.rows) {
    throw std::invalid_argument("the number of symbols fits no message");
  }
  const int64_t width = layout_.width, wide = columns_ * inner_, e = layout_.features;
  std::vector<int64_t> state(width, 0), after(width), sums(wide), x(inputs_), row;
  for (int64_t t = 0, n = 0; n < count; ++t) {
    const int64_t p = t % pieces_;
    for (int64_t i = 0; i < wide; ++i) sums[i] = bias_[t * wide + i] * kWeight;
    for (int64_t h = 0; h < width; ++h) add(sums, state[h], &read_[(p * width + h) * wide]);
    std::fill(x.begin(), x.end(), 0);
    for (int64_t column = 0; column < columns_ && sizes_[p * columns_ + column] > 0; ++column, ++n) {
      row_of(sums, t, p, column, row);
      if (!coder.take(row, symbols[n])) return false;
      for (int64_t i = column * e; i < (column + 1) * e; ++i) {
        x[i] = features_[((p * columns_ + column) * values_ + symbols[n]) * e + i - column * e];
        add(sums, x[i], &own_[(p * inputs_ + i) * wide], (column + 1) * inner_);
      }
    }
    for (int64_t h = 0; h < width; ++h) after[h] = shift_[t * width + h] * kWeight;
    for (int64_t h = 0; h < width; ++h) add(after, state[h], &carry_[h * width]);
    for (int64_t i = 0; i < inputs_; ++i) add(after, x[i], &takes_[(p * inputs_ + i) * width]);
    std::transform(after.begin(), after.end(), state.begin(), activation);
  }
  return true;
}

// The cumulative frequencies of a column, from what its layer has summed.
void RecurrentPrior::row_of(const std::vector<int64_t>& sums, int64_t t, int64_t p, int64_t column,
                            std::vector<int64_t>& row) const {
  const int64_t size = sizes_[p * columns_ + column];
  std::vector<int64_t> logits(size, 0);
  for (int64_t w = 0; w < inner_; ++w) {
    add(logits, activation(sums[column * inner_ + w]), &out_[((p * columns_ + column) * inner_ + w) * values_]);
  }
  const int16_t* base = &base_[(t * columns_ + column) * values_];
  for (int64_t k = 0; k < size; ++k) logits[k] = base[k] + (logits[k] >> kWeightBits);
  const auto likeliest = std::max_element(logits.begin(), logits.end()) - logits.begin();
  const int64_t most = logits[likeliest];
  int64_t sum = 0;
  for (auto& logit : logits) {
    const int64_t below = most - logit;
    logit = powers_[below & (kOne - 1)] >> std::min<int64_t>(below >> kFractionBits, kFar);
    sum += logit;
  }
  int64_t given = 0;
  for (auto& weight : logits) given += weight = 1 + weight * (kTotal - size) / sum;
  logits[likeliest] += kTotal - given;
  row.assign(size + 1, 0);
  for (int64_t k = 0; k < size; ++k) row[k + 1] = row[k] + logits[k];
}

}  // namespace latentwire
