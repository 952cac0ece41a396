// Rows of a NumPy file (.npy, little-endian float32 or float64, C order), read where they lie.
#pragma once
#include <bit>
#include <fstream>
#include <string>

#include "policies/errors.hpp"
#include "policies/policy.hpp"

namespace kvreplay {

class NpyFile {
 public:
  explicit NpyFile(const std::string& path) : path_(path), file_(path, std::ios::binary) {
    static_assert(std::endian::native == std::endian::little);
    char head[10] = {};
    file_.read(head, sizeof head);
    if (!file_ || std::string(head, 6) != "\x93NUMPY") {
      throw ConfigError(path + " cannot be read as a NumPy file (.npy)");
    }
    std::size_t length = byte(head[8]) + 256 * byte(head[9]);
    if (head[6] > 1) {  // version 2 and later: four bytes
      char more[2] = {};
      file_.read(more, sizeof more);
      length += 65536 * byte(more[0]) + 16777216 * byte(more[1]);
    }
    std::string header(std::min<std::size_t>(length, 1 << 16), ' ');
    file_.read(header.data(), static_cast<std::streamsize>(header.size()));
    begin_ = file_.tellg();
    const bool f4 = header.find("'<f4'") != std::string::npos, f8 = header.find("'<f8'") != std::string::npos;
    const auto open = header.find('('), close = header.find(')');
    if (!file_ || (!f4 && !f8) || header.find("'fortran_order': False") == std::string::npos ||
        open == std::string::npos || close == std::string::npos) {
      throw ConfigError(path + " is not an array of float32 or float64 in C order");
    }
    size_ = f4 ? 4 : 8;
    std::size_t number = 0;
    bool digits = false;
    for (const char c : header.substr(open + 1, close - open)) {
      if (c >= '0' && c <= '9') {
        number = 10 * number + byte(c) - byte('0');
        digits = true;
      } else if (digits) {
        shape_.push_back(static_cast<Eigen::Index>(number));
        number = 0;
        digits = false;
      }
    }
  }

  const std::vector<Eigen::Index>& shape() const { return shape_; }
  std::string shape_text() const {
    std::string text;
    for (const Eigen::Index n : shape_) {
      text += (text.empty() ? "" : ", ") + std::to_string(n);
    }
    return "[" + text + "]";
  }

  // Numbers offset .. offset + rows * cols of the flat array: (rows, cols).
  MatD read(Eigen::Index offset, Eigen::Index rows, Eigen::Index cols) {
    MatD out(rows, cols);
    file_.seekg(begin_ + static_cast<std::streamoff>(offset * size_));
    if (size_ == 4) {
      MatF narrow(rows, cols);
      file_.read(reinterpret_cast<char*>(narrow.data()), static_cast<std::streamsize>(narrow.size() * size_));
      out = narrow.cast<double>();
    } else {
      file_.read(reinterpret_cast<char*>(out.data()), static_cast<std::streamsize>(out.size() * size_));
    }
    if (!file_ || !out.allFinite()) {
      throw ConfigError(path_ + " is cut short or holds numbers that are not finite");
    }
    return out;
  }

 private:
  static std::size_t byte(char c) { return static_cast<unsigned char>(c); }

  std::string path_;
  std::ifstream file_;
  std::streampos begin_;
  std::vector<Eigen::Index> shape_;
  Eigen::Index size_ = 4;  // bytes of a number
};

}  // namespace kvreplay
