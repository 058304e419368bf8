// In the place of ATen's header of this name: at::parallel_for by std::thread, whose order ThreadSanitizer knows.
#pragma once

#include <algorithm>
#include <exception>
#include <latch>
#include <thread>
#include <vector>

#define INTRA_OP_PARALLEL

namespace at::internal {

template <typename F>
void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  const int64_t count = std::min<int64_t>(get_num_threads(), divup(end - begin, std::max<int64_t>(grain_size, 1)));
  const int64_t share = divup(end - begin, count);
  const int64_t used = divup(end - begin, share);
  std::latch all(used);
  std::vector<std::exception_ptr> errors(used);
  std::vector<std::thread> threads;
  for (int64_t id = 0; id < used; ++id)
    threads.emplace_back([&, id] {
      all.arrive_and_wait();  // else the first of them takes every small task
      try {
        const ThreadIdGuard guard(static_cast<int>(id));
        f(begin + id * share, std::min(end, begin + (id + 1) * share));
      } catch (...) {
        errors[id] = std::current_exception();
      }
    });
  for (std::thread& each : threads) each.join();
  for (const std::exception_ptr& each : errors)
    if (each) std::rethrow_exception(each);
}

}  // namespace at::internal
