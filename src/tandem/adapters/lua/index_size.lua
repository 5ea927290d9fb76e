-- ARGV: model -> blocks indexed
return tonumber(redis.call('GET', size_key(ARGV[1])) or '0')
